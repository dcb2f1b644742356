from setuptools import find_packages, setup

# Detectron2 itself is installed by tools/install_detectron2.py: it is not on the package index
# under its own name. constraints.txt holds the exact versions that were tested together.
setup(
    name="d2ssl",
    version="0.1.0",
    description="Self-supervised pretraining of ResNet + FPN inside Detectron2, for few labels",
    packages=find_packages(include=["d2ssl", "d2ssl.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.3,<2.13",
        "torchvision>=0.18,<0.28",
        "numpy>=1.23,<3",
        "Pillow>=9.1,<14",
        "fvcore>=0.1.5.post20221221,<0.1.6",
        "lightly>=1.5,<1.7",
        "pycocotools>=2.0.7,<2.1",
        # Headless: it needs no libGL. Never beside another opencv-*, since all own the module cv2.
        "opencv-python-headless>=4.6,<6",
        "ImageHash>=4.3,<5",
        "ijson>=3.1,<4",
        "scikit-image>=0.20,<0.27",
        "scipy>=1.12,<2",
        "shapely>=2.0,<3",  # fvcore crops polygons with it
        "submitit>=1.5,<2",
        "matplotlib>=3.6,<4",
        "tensorboard>=2.12,<3",
        "tqdm>=4.62,<5",
        "tabulate>=0.9,<1",
    ],
    extras_require={"test": ["pytest>=7.4,<10", "pytest-xdist>=3.3,<4"]},
)
