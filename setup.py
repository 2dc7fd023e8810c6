"Copies what comes along into the built package; core.resources finds it there. All else stands in pyproject.toml."

import shutil
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
COMES_ALONG = (  # MANIFEST.in takes the same into the sdist
    'nbs/analyses/*.ipynb',
    'data/models/glyph-llava/*',
    'data/models/checksums.json',
    'data/reference/*.csv',
    'data/project/*',
    'data/refine/*.md',
    'data/refine/custom_generate/*',
    'data/example.png',
)


class build(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # there the files themselves are used
        for pattern in COMES_ALONG:
            for file in sorted(ROOT.glob(pattern)):
                to = Path(self.build_lib) / 'fusion_notebooks/shipped' / file.relative_to(ROOT)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)


setup(cmdclass=dict(build_py=build))
