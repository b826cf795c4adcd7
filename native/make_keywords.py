"""Keyword classes of the tokeniser, and the generator of native/keywords.pxd.

    python native/make_keywords.py        rewrite native/keywords.pxd from the lists below

A token's class is what the token n-grams see, so words of one class are interchangeable to
the model: `cat` and `less` are one thing, which is how a verb that no training payload used
is still recognised in its surroundings. A word stands in the first class that lists it.
"""
from __future__ import annotations

from pathlib import Path

# Token numbers below 128 are punctuation (its own byte) and shapes; see native/ngram.pxd.
FIRST = 128

CLASSES: dict[str, str] = {
    "SQL_VERB": """select insert update delete drop alter truncate merge exec execute declare union
        grant revoke""",
    "SQL_CLAUSE": """where having group order limit offset join into values table tables columns
        database distinct exists procedure analyse case when then end begin cursor fetch returning""",
    "SQL_LOGIC": "and or not like between xor div rlike regexp is null in mod true false sounds any some",
    "SQL_FUNC": """sleep benchmark concat concat_ws group_concat substring substr ascii ord char chr hex
        unhex load_file outfile dumpfile extractvalue updatexml pg_sleep waitfor delay version
        current_user session_user system_user count cast convert ifnull nullif coalesce
        char_length mid randomblob sqlite_version dbms_pipe dbms_lock utl_http utl_inaddr
        xp_cmdshell xp_dirtree sp_executesql sp_password openrowset opendatasource make_set elt
        row_number string_agg array_agg listagg regexp_substring_similar dbms_xmlgen ctxsys rownum
        md5 sha1 if iif floor rand round bin field interval nvl ltrim rtrim lpad rpad
        json_extract json_keys polygon geometrycollection gtid_subset name_const user""",
    "SQL_META": """information_schema table_name column_name table_schema column_names schema_name
        sysobjects syscolumns sysusers pg_catalog pg_tables pg_user sqlite_master dual all_tables
        all_tab_columns user_tables msysaccessobjects sysdatabases schemata db_name version_compile_os
        datadir basedir hostname innodb_table_stats sysibm sysdummy1 rdb""",
    "HTML_STRONG": """script svg iframe object embed applet base meta link style marquee isindex math
        video audio details frameset frame animate animatetransform foreignobject bgsound keygen
        srcdoc xlink formaction autofocus contenteditable xss template noscript dialog portal""",
    "HTML_WEAK": """div span td tr th tbody thead br ul ol li form input button textarea img href src
        html head title body h1 h2 h3 h4 option label p b i u em strong pre code center font image
        width height class alt rel target type name value border""",
    "EVENT": """onerror onload onclick onmouseover onfocus onblur onmouseenter onmousemove onmouseout
        onmousedown onmouseup onmouseleave onkeydown onkeyup onkeypress onsubmit onchange oninput
        onselect ontoggle onstart onbegin onend onrepeat onanimationstart onanimationend
        onanimationiteration ontransitionend ontransitionstart onpageshow onpagehide onhashchange
        onpopstate onmessage onscroll onresize onwheel oncopy oncut onpaste ondrag ondragstart ondrop
        ondragover ondblclick oncontextmenu onauxclick onpointerdown onpointerover onpointerenter
        onpointermove onpointerup onpointerrawupdate ontouchstart ontouchend ontouchmove onplay
        onplaying oncanplay onloadstart onloadeddata onloadedmetadata ondurationchange ontimeupdate
        onended onseeked onvolumechange onwaiting onunload onbeforeunload onafterprint onbeforeprint
        onfinish onbounce onactivate onbeforeactivate onfocusin onfocusout onreadystatechange
        onpropertychange onsearch oninvalid onreset onshow onstorage onerrorupdate
        onanimationcancel ontransitionrun ontransitioncancel onbeforeinput onbeforetoggle
        onscrollend onsecuritypolicyviolation onunhandledrejection onfullscreenchange oncuechange""",
    "JS_STRONG": """alert prompt confirm eval fromcharcode atob btoa document cookie settimeout
        setinterval xmlhttprequest localstorage sessionstorage innerhtml outerhtml javascript vbscript
        livescript expression execscript msgbox writeln importscripts sendbeacon createelement
        appendchild domain onpropertychange tostring parseint decodeuri decodeuricomponent unescape
        throw globalthis srcelement reflect parent top opener frames""",
    "JS_WEAK": """var let const return new this function typeof window location fetch console log
        async await promise json stringify self void undefined nan infinity math prop array string
        import export default class extends super static yield while do for else switch
        break continue try catch finally delete instanceof""",
    "SHELL_STRONG": """whoami uname wget curl netcat ncat nslookup ifconfig ipconfig netstat chmod chown
        certutil powershell pwsh bitsadmin wmic systeminfo tasklist mshta rundll32 regsvr32 nohup
        crontab mkfifo xargs busybox iptables useradd adduser passwd sudo killall pkill lsof setuid
        traceroute tracert getent hostnamectl printenv invoke iex iwr downloadstring downloadfile
        encodedcommand noprofile ifs xxd base32 base64 rev tac nl od cmd bash zsh ksh csh dash
        python2 python3 perl ruby lua socat telnet tftp scp rsync""",
    "SHELL_WEAK": """cat ls id echo ping sh nc rm cp mv more less head tail type dir find grep egrep awk
        sed tee kill ps w who pwd sort cut tr wc env set net ver vol copy del move start date touch
        mkdir rmdir tar gzip gunzip zip unzip ssh dig host arp route node php python npm pip git gcc
        make mount df du free uptime top last history alias export source exit sleep printf test expr
        timeout which whereis locate file stat ln dd split""",
    "PATH_DIR": """etc proc usr bin sbin tmp winnt windows system32 inetpub boot dev opt srv mnt
        sysroot wwwroot htdocs public_html web meta inf systemroot windir programdata appdata cgi
        fd self drivers""",
    "PATH_FILE": """shadow hosts htaccess htpasswd ini win bash_history id_rsa authorized_keys
        environ access_log error_log access error log4j svn wp_config config sam ntuser
        issue group mtab fstab resolv motd sshd_config my cnf httpd conf cmdline version_info passwords
        master credentials secrets""",
    "PHP": """phpinfo system passthru shell_exec proc_open popen pcntl_exec assert preg_replace
        base64_decode file_get_contents file_put_contents fopen fwrite readfile include require
        include_once require_once _get _post _request _server _cookie _session _files globals
        unserialize call_user_func call_user_func_array create_function array_map usort
        allow_url_include auto_prepend_file auto_append_file disable_functions safe_mode
        open_basedir gzinflate gzuncompress str_rot13 move_uploaded_file show_source highlight_file
        ini_set ini_get die var_dump print_r get_defined_vars getallheaders scandir glob
        set_time_limit error_reporting fsockopen curl_exec extract parse_str chr_php echo_php
        eval_stdin phar""",
    "JAVA": """java javax runtime getruntime processbuilder forname getclass classloader ognl
        memberaccess _memberaccess ognlcontext springframework scriptenginemanager scriptengine
        newinstance getmethod getmethods invoke_java getconstructor getdeclaredmethod
        defaultmemberaccess allowstaticmethodaccess denymethodexecution xwork opensymphony struts2
        dispatcher actioncontext getinputstream ioutils servletcontext applicationscope sessionscope
        requestscope class_loader groovy nashorn jshell beanutils commons collections
        invokertransformer chainedtransformer constanttransformer instantiatetransformer
        objectinputstream spel urlclassloader""",
    "TEMPLATE": """__class__ __mro__ __subclasses__ __globals__ __builtins__ __import__ __init__
        __base__ __bases__ __dict__ __getattribute__ __getitem__ __reduce__ subprocess check_output
        lipsum cycler joiner namespace freemarker velocity utility ftl
        range_dict getfilter registerundefinedfiltercallback smarty twig mako jinja jinja2 erb
        thymeleaf popen2 url_for get_flashed_messages _self request_class mixin""",
    "XML": """doctype entity cdata xinclude xsl stylesheet xmlns soap soapenv envelope public
        element attlist notation dtd xpath ancestor descendant sibling following preceding
        normalize text position document_xml fallback xs xsd""",
    "LDAP": """objectclass cn uid ou dc userpassword samaccountname memberof objectcategory
        givenname sn useraccountcontrol distinguishedname homedirectory""",
    "NOSQL": """ne gt gte lt lte regex nin elemmatch mapreduce tojson tojsononeline getcollectionnames
        getname listdatabases expr_mongo eq size all jsonschema""",
    "SCHEME": """http https ftp gopher dict ldap ldaps rmi dns jar data expect netdoc ssh2 tftp_url
        smb iiop corba nis ws wss mailto feed view zlib ogg filter resource convert_base64 input_php
        stdin""",
    "SSRF": """localhost metadata loopback computemetadata nip xip sslip burpcollaborator
        interact oast oastify dnslog ceye requestbin webhook internal compute localdomain
        lvh localtest kubernetes svc imds""",
    "JNDI": "jndi lower upper ctx sys marker bundle basicorb nds",
    "PROTO": "__proto__ prototype constructor __definegetter__ __definesetter__ __lookupgetter__",
    "HTTP_WORD": """get post put head_method options trace connect patch host content length transfer
        encoding chunked accept user agent set location referer cookie2 refresh cache control
        authorization keep alive""",
    "MAIL": "bcc cc rcpt subject mail from helo ehlo quit starttls authenticate login capability noop",
    "EXT": """asp aspx jsp jspx cfm cgi exe bat ps1 dll vbs bak old sql mdb swp orig inc phtml php3 php4
        php5 php7 shtml war py rb pl jar_file key pem crt yml yaml env_file""",
    "STOP": """the a of to how what my with i on this that it you for are be at can have was we if_
        do_ does by as an but so me your there when_ why who_ which_ from_ about use using get_
        between_ will would should could than then_ has had they he she his her our us their them
        these those one two first best way difference same word correct please thanks hello help
        need want does_not don doesn didn isn im ive cannot without after before because while_
        into_ only also just more_ most other such no yes up out off over under again once here
        both each few own too very com www de la le el los les des et und der die das ist""",
    "TECH": """user_id username password email token session page search query lang version_id utf 
        api app client server key_name category product item items order_id price color sort_by
        filter_by utm utm_source utm_medium utm_campaign utm_content utm_term gclid fbclid ref
        mozilla applewebkit khtml gecko chrome safari firefox edge edg linux x86_64 android iphone
        macintosh intel mac os windows_nt nt win64 x64 compatible bot spider crawler google bing
        yahoo facebook en he fr es us image jpg jpeg png gif webp css js json xml woff woff2 ttf svg_
        static assets media images uploads content_ themes plugins min bundle cdn""",
}

SLOTS = 4096


def word_hash(word: bytes) -> int:
    """FNV-1a, 32 bits."""
    h = 2166136261
    for b in word:
        h = ((h ^ b) * 16777619) & 0xFFFFFFFF
    return h


def words() -> dict[str, int]:
    """Every keyword with its token number; the first class that lists a word has it."""
    out: dict[str, int] = {}
    for k, text in enumerate(CLASSES.values()):
        for word in text.split():
            out.setdefault(word, FIRST + k)
    return out


def table() -> list[int]:
    """Open addressing, slot = hash mod SLOTS: upper 24 bits of the hash, lower 8 the token number."""
    slots = [0] * SLOTS
    for word, token in words().items():
        h = word_hash(word.encode())
        k = h % SLOTS
        while slots[k]:
            if (slots[k] ^ h) >> 8 == 0:
                raise ValueError(f"keyword {word!r} collides: rename or drop it")
            k = (k + 1) % SLOTS
        slots[k] = (h & 0xFFFFFF00) | token
    return slots


def render() -> str:
    names = [f"    TOKEN_{name} = {FIRST + k}" for k, name in enumerate(CLASSES)]
    slots = table()
    rows = ["    " + ", ".join(f"0x{v:x}" if v else "0" for v in slots[i:i + 10]) + ","
            for i in range(0, SLOTS, 10)]
    body = "\n".join(rows)
    return f'''"""Keyword table of the tokeniser. Generated by make_keywords.py: edit the lists there."""
from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    TOKEN_CLASS_FIRST = {FIRST}
    TOKEN_CLASSES = {len(CLASSES)}
{chr(10).join(names)}

cdef extern from *:
    """
    static const uint32_t or_keywords[{SLOTS}] = {{
{body}
    }};
    static inline uint8_t or_keyword(uint32_t h) {{
        uint32_t k = h & {SLOTS - 1}u, v;
        while ((v = or_keywords[k]) != 0) {{
            if (((v ^ h) >> 8) == 0) return (uint8_t)v;
            k = (k + 1) & {SLOTS - 1}u;
        }}
        return 0;
    }}
    """
    uint8_t or_keyword(uint32_t h) noexcept nogil      # token number of a keyword's FNV-1a hash, 0: none
'''


if __name__ == "__main__":
    Path(__file__).with_name("keywords.pxd").write_text(render())
