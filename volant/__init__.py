"""A control plane for microVMs on one host.

Guests run this file too, so it imports nothing.
"""

__version__ = "0.1.0"
"""The version of the package, the daemon and the guest agent; `pyproject.toml` reads it from here."""


def lazy_exports(package: str, modules: dict[str, str]) -> object:
    """Returns the `__getattr__` of a package that imports its modules when one of their names is first used.

    :param modules: the module of each name, without the package's name
    """

    def find(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import sys

        # Not importlib: each boot image would get it with this file.
        value = getattr(__import__(f"{package}.{modules[name]}", fromlist=(name,)), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
