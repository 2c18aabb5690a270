from pctt.backends.operations import BACKENDS, Backend, BackendUnavailable, DeviceLost, backend

__all__ = ["BACKENDS", "Backend", "BackendUnavailable", "DeviceLost", "backend"]
