# The compiled module of jaxlib ships without type stubs, so that pyright takes `jax.Device` for a variable.
from typing import Any

class Client:
    platform: str
    platform_version: str
    def __getattr__(self, name: str) -> Any: ...

class Device:
    id: int
    process_index: int
    platform: str
    device_kind: str
    client: Client
    def memory_stats(self) -> dict[str, int] | None: ...
    def __getattr__(self, name: str) -> Any: ...

def __getattr__(name: str) -> Any: ...
