"""Build of the native core: every native/*.pyx becomes an extension module."""
import os
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

extensions = [
    Extension(f"native.{path.stem}", [str(path)], extra_compile_args=CFLAGS,
              extra_link_args=LDFLAGS, libraries=["m", "dl"])
    for path in sorted(Path("native").glob("*.pyx"))
]

setup(ext_modules=cythonize(extensions, compiler_directives=DIRECTIVES, nthreads=0))
