# Made from nearep.h at build time: constants, structures and FUNCTIONS.
from typing import Any

def __getattr__(name: str) -> Any: ...
