# Types of the compiled module. The declarations are those of csrc/shmr.h; cffi checks the arguments.
from typing import Any

ffi: Any
lib: Any
