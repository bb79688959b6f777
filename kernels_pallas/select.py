"""Which implementation of an op runs, and for which device: the only place that asks for a platform."""

import dataclasses
from types import ModuleType

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """The device a program is traced for."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as the device calls itself: "TPU v5", "NVIDIA H200"


def target() -> Target:
    """The device of the mesh in force (`jax.set_mesh`), which need not be of this machine; else the default device.

    The mesh in force is part of what JAX caches a trace by, and is seen under jit, vmap, shard_map and custom_vjp
    alike, so that a program lowered ahead of time for a TPU topology gets TPU kernels on a host without one.
    """
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return Target(device.platform, device.device_kind)
    default = jax.config.jax_default_device
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    return Target(device.platform, device.device_kind)


def select(op: str, name: str, implementations: dict[str, ModuleType], *arguments) -> ModuleType:
    """The implementation called `name`; "auto": the first that supports this device and these arguments.

    Args:
      implementations: in the order in which "auto" tries them, kernels first: nothing is timed. A module that does not
        run everywhere has `unsupported(target, *arguments)`, the reason why it cannot run, or None; one that is not for
        every device has `automatic(target)`, whether it may be taken unnamed.
    Raises:
      ValueError: there is no such implementation, or it cannot run: the message lists those there are, or says why.
    """
    if name != "auto":
        if name not in implementations:
            raise ValueError(f"{op}: no implementation {name!r}; there are auto, {', '.join(implementations)}")
        if reason := unsupported(implementations[name], *arguments):
            raise ValueError(f"{op}: implementation {name!r} cannot run: {reason}")
        return implementations[name]
    return next(m for m in implementations.values() if automatic(m) and unsupported(m, *arguments) is None)


def unsupported(implementation: ModuleType, *arguments, on: Target | None = None) -> str | None:
    """Why `implementation` cannot run with these arguments on `on` (None: the present target); None if it can."""
    predicate = getattr(implementation, "unsupported", None)
    return predicate(on or target(), *arguments) if predicate else None


def automatic(implementation: ModuleType, on: Target | None = None) -> bool:
    """Whether "auto" may take `implementation` on this device, where another one may be faster."""
    predicate = getattr(implementation, "automatic", None)
    return predicate(on or target()) if predicate else True
