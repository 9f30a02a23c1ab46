"""The compiled half of the package, built from ``crates/kvar-python``."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias, TypeVar, final

from typing_extensions import Buffer

_T_co = TypeVar("_T_co", covariant=True)
_Items: TypeAlias = Iterable[tuple[bytes, Buffer | Sequence[Buffer]]]

__all__ = [
    "Client",
    "ConfigError",
    "ConnectError",
    "ContentFingerprint",
    "GetResult",
    "KvarError",
    "LayerGet",
    "LayerPut",
    "Lease",
    "NamespaceKey",
    "Pending",
    "PendingLease",
    "PutHints",
    "RequestError",
    "StagingBuffer",
    "VersionError",
    "WrongKeyError",
    "__version__",
    "derive_ids",
    "id_from_name",
]

__version__: str

class KvarError(Exception): ...
class ConnectError(KvarError): ...
class VersionError(KvarError): ...
class WrongKeyError(KvarError): ...
class ConfigError(KvarError): ...
class RequestError(KvarError): ...

@final
class NamespaceKey:
    @staticmethod
    def from_file(path: str | PathLike[str]) -> NamespaceKey: ...
    @staticmethod
    def from_hex(text: str) -> NamespaceKey: ...
    @property
    def short_name(self) -> str: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class ContentFingerprint:
    @staticmethod
    def of_text(text: str) -> ContentFingerprint: ...
    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def derive_ids(
    key: NamespaceKey,
    engine_hashes: Sequence[bytes],
    fingerprint: ContentFingerprint,
    head_slice: tuple[int, int] = (0, 1),
    group: int = 0,
) -> list[bytes]: ...
def id_from_name(key: NamespaceKey, name: str) -> bytes: ...

@final
class GetResult:
    @property
    def outcome(self) -> str: ...
    @property
    def bytes(self) -> int: ...

@final
class PutHints:
    def __new__(
        cls,
        *,
        request: int = 0,
        ephemeral: bool = False,
        traffic_class: int = 0,
        recompute_us: int = 0,
        handover: bool = False,
    ) -> Self: ...
    @property
    def request(self) -> int: ...
    @property
    def ephemeral(self) -> bool: ...
    @property
    def traffic_class(self) -> int: ...
    @property
    def recompute_us(self) -> int: ...
    @property
    def handover(self) -> bool: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class Lease:
    @property
    def leading(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def token(self) -> bytes | None: ...
    @property
    def held(self) -> bool: ...
    @property
    def left_s(self) -> float: ...
    def renew(self, ttl_s: float = 2.0, *, wait: bool = True) -> bool: ...
    def release(self, *, wait: bool = True) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class PendingLease:
    def done(self) -> bool: ...
    def result(self) -> Lease: ...

@final
class Pending(Generic[_T_co]):
    def done(self) -> bool: ...
    def result(self, timeout: float | None = None) -> _T_co: ...
    def add_done_callback(self, callback: Callable[[], object]) -> None: ...
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> Any: ...

@final
class LayerGet:
    @property
    def sections(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...
    def wait_section(self, section: int, timeout: float | None = None) -> list[str]: ...
    def done(self) -> bool: ...
    def result(self, timeout: float | None = None) -> list[str]: ...

@final
class LayerPut:
    @property
    def sections(self) -> int: ...
    def filled(self, count: int) -> None: ...
    def commit(self, *, deadline_ms: int | None = None) -> Pending[list[str]]: ...
    def abort(self) -> None: ...

@final
class StagingBuffer(Buffer):
    @property
    def nbytes(self) -> int: ...
    @property
    def shared(self) -> bool: ...
    @property
    def in_use(self) -> bool: ...
    def __len__(self) -> int: ...

@final
class Client:
    def __new__(
        cls,
        endpoint: str,
        namespace: str = "default",
        key: NamespaceKey | None = None,
        *,
        key_file: str | PathLike[str] | None = None,
        deadline_ms: int = 1000,
        connect_timeout_ms: int = 1000,
        links: int = 1,
        link: str = "auto",
        lazy: bool = False,
        name: str | None = None,
        staging: int = 0,
    ) -> Self: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def link(self) -> str: ...
    @property
    def not_shared(self) -> str | None: ...
    @property
    def staging_bytes(self) -> int: ...
    @property
    def not_staged(self) -> str | None: ...
    @property
    def hits_placed(self) -> int: ...
    def staging(self, nbytes: int) -> StagingBuffer: ...
    @property
    def mode(self) -> str: ...
    @property
    def block_bytes_max(self) -> int | None: ...
    @property
    def announced_bytes_max(self) -> int | None: ...
    @property
    def announced_blocks_max(self) -> int | None: ...
    def lookup(
        self, ids: Sequence[bytes], *, deadline_ms: int | None = None, request: int = 0
    ) -> int: ...
    def lookup_leased(
        self,
        ids: Sequence[bytes],
        *,
        ttl_s: float = 2.0,
        deadline_ms: int | None = None,
        request: int = 0,
    ) -> Lease: ...
    def submit_lookup_leased(
        self,
        ids: Sequence[bytes],
        *,
        ttl_s: float = 2.0,
        deadline_ms: int | None = None,
        request: int = 0,
    ) -> PendingLease: ...
    def renew(
        self, token: bytes, ttl_s: float = 2.0, *, deadline_ms: int | None = None
    ) -> float | None: ...
    def release(self, token: bytes, *, deadline_ms: int | None = None) -> bool: ...
    def present(self, ids: Sequence[bytes], *, deadline_ms: int | None = None) -> list[bool]: ...
    def get(
        self,
        items: _Items,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
    ) -> list[GetResult]: ...
    def get_bytes(self, id: bytes, *, deadline_ms: int | None = None) -> bytes | None: ...
    def get_pages(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
    ) -> list[GetResult]: ...
    def put(
        self,
        items: _Items,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> list[str]: ...
    def put_pages(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> list[str]: ...
    def remove(self, ids: Sequence[bytes], *, deadline_ms: int | None = None) -> int: ...
    def flush(self, *, deadline_ms: int | None = None) -> None: ...
    def status(self, *, deadline_ms: int | None = None) -> dict[str, Any]: ...
    def submit_get(
        self,
        items: _Items,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
    ) -> Pending[list[GetResult]]: ...
    def submit_put(
        self,
        items: _Items,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> Pending[list[str]]: ...
    def submit_get_pages(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
    ) -> Pending[list[GetResult]]: ...
    def submit_get_layers(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
        wait_announced: bool = False,
    ) -> LayerGet: ...
    def submit_put_pages(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> Pending[list[str]]: ...
    def submit_put_layers(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> LayerPut: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
