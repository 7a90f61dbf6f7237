"""Set-up of devices and of the cache of compiled programs."""

import os


def open_devices() -> None:
    """Set up the compile cache and open the devices.

    Raises:
      UserError: the platform named by JAX_PLATFORMS is not available, or the driver of its GPUs is too old.
    """
    from lpo_jax.parallel import hosts

    use_compile_cache()
    hosts.require_devices()


def use_compile_cache() -> None:
    """Keep compiled programs on disk, so that a second start does not compile them again."""
    import jax

    from lpo_jax.hub import cache_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
