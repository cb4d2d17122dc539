"""The list of packages, which setup.cfg cannot state: the repository's root is the package ``intertitle``."""

from setuptools import find_packages, setup

found = find_packages(exclude=["tests", "tests.*"])
# With its name said, setuptools leaves this script out of the package.
setup(script_name="setup.py", packages=["intertitle", *(f"intertitle.{name}" for name in found)])
