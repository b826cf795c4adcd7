"""Build of the native core: every native/*.pyx becomes an extension module."""
import os
import subprocess
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "cpow": True,
    "embedsignature": True,
}

# -O3 without -march: the same wheel runs on any x86-64 or arm64; kernels that want more
# choose at run time.
CFLAGS = ["-O3", "-fno-plt", "-fno-semantic-interposition", "-fvisibility=hidden",
          "-ffunction-sections", "-fdata-sections", "-Wno-unused-function", "-Wno-sign-compare"]
LDFLAGS = ["-Wl,--gc-sections", "-Wl,-z,relro,-z,now"]
if os.environ.get("OUTRIDER_SANITIZE"):
    flags = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
    CFLAGS += flags
    LDFLAGS += flags


def has_nghttp2() -> bool:
    """Can programs be built with libnghttp2 (Debian: libnghttp2-dev)? Without it there is no native transport,
    and the one on grpcio serves."""
    program = "#include <nghttp2/nghttp2.h>\nint main(void) { return !nghttp2_version(0x013400); }\n"
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([os.environ.get("CC", "gcc"), "-x", "c", "-", "-o", f"{folder}/probe", "-lnghttp2"],
                              input=program.encode(), stderr=subprocess.DEVNULL, check=False).returncode == 0


NEEDS_NGHTTP2 = {"http2"}
found = has_nghttp2()
if not found:
    print("libnghttp2 not found: native.http2 is left out (the grpcio transport serves)")
extensions = [
    Extension(f"native.{path.stem}", [str(path)], extra_compile_args=CFLAGS, extra_link_args=LDFLAGS,
              libraries=["m", "dl", *(["nghttp2"] if path.stem in NEEDS_NGHTTP2 else [])])
    for path in sorted(Path("native").glob("*.pyx"))
    if found or path.stem not in NEEDS_NGHTTP2
]

setup(ext_modules=cythonize(extensions, compiler_directives=DIRECTIVES, nthreads=0))
