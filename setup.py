"""What pyproject.toml cannot say of the package."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3: the library is loaded by ctypes and uses nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, its binary interface, the platform."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"bdist_wheel": PlatformWheel})
