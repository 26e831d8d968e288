"""Build of kolors_fast: `kernels/` becomes `kolors_fast.kernels`, `csrc/` the extensions."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kolors_fast", "kolors_fast.*"]), "kolors_fast.kernels"],
    package_dir={"kolors_fast.kernels": "kernels"},
)
