from pctt.backends.operations import Backend, BackendUnavailable, backend

__all__ = ["Backend", "BackendUnavailable", "backend"]
