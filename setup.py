"Hands settings.ini, the one place that describes the package, to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here/"README.md"
oldest = int(cfg["min_python"].split(".")[1])

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", f"Intended Audience :: {cfg['audience']}",
                 "Topic :: Scientific/Engineering :: Mathematics", "Typing :: Typed",
                 "Programming Language :: Python :: 3",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in range(oldest, 15))],
    packages=find_packages(include=["samsde", "samsde.*"]),
    package_data={"samsde": ["py.typed"], "samsde.experiments": ["measured/*.csv"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "frameworks": cfg["frameworks_requirements"].split()},
    # the second entry point is what turns `names` in backticks into links, in this project's notebooks and in others'
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["samsde=samsde._modidx:d"]},
    zip_safe=False,
)
