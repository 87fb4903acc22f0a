"""A stand-in for `jax.distributed`'s coordination service: threads are the processes."""

import threading

import jax


class Service:
    """Keys and values as `jax.distributed`'s client keeps them."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nothing came")
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            for name in [n for n in self.values if n == key or n.startswith(key + "/")]:
                del self.values[name]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]
