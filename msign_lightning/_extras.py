"""What the optional parts of this package need besides PyTorch and Lightning."""

from importlib.util import find_spec


def need(extra: str, *modules: str) -> None:
    """Checks that modules are installed which an extra of this package brings, without importing them.

    Raises:
        ModuleNotFoundError: Some are not.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{", ".join(missing)} not installed: pip install "msign-lightning[{extra}]"', name=missing[0]
        )
