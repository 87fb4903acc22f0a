"""What `import colbert_jax` brings in, in a fresh process."""

import subprocess
import sys


def test_heavy_packages_are_not_imported():
    code = (
        "import sys, colbert_jax\n"
        "heavy = ('torch', 'transformers', 'datasets', 'huggingface_hub', 'ir_measures',"
        " 'matplotlib', 'pandas', 'PIL')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_few_modules_beyond_jax_and_flax():
    """The bar is 0.3 s beyond jax and flax. Time is noisy here; modules are counted instead."""
    code = (
        "import sys, jax, flax.nnx\nbefore = set(sys.modules)\nimport colbert_jax\n"
        "print(len(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 150, done.stdout + done.stderr
