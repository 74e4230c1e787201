"Packaging. Every value lives in settings.ini: edit there, not here."
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

needed = 'lib_name lib_path version description keywords author license status min_python audience language git_url'
missing = [o for o in needed.split() if o not in cfg]
assert not missing, f'settings.ini lacks: {" ".join(missing)}'

statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
spdx = {'apache2': 'Apache-2.0'}
lib = cfg['lib_path']
reqs = lambda name: shlex.split(cfg.get(f'{name}requirements', ''))

class BuildWithResults(build_py):
    "Puts the stored results of the notebooks into the wheel"
    def run(self):
        super().run()
        if not self.editable_mode: shutil.copytree(here/'nbs'/'results', Path(self.build_lib)/lib/'results', dirs_exist_ok=True)

setup(
    cmdclass={'build_py': BuildWithResults},
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], url=cfg['git_url'], license=spdx[cfg['license']],
    classifiers=[f'Development Status :: {statuses[int(cfg["status"])-1]}', f'Intended Audience :: {cfg["audience"]}',
                 f'Natural Language :: {cfg["language"]}', 'Programming Language :: Python :: 3'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']),
    python_requires=f'>={cfg["min_python"]}',
    install_requires=reqs(''),
    extras_require={'bench': reqs('bench_'), 'peers': reqs('bench_') + reqs('peers_'), 'ray': reqs('bench_') + reqs('ray_'),
                    'dev': reqs('bench_') + reqs('peers_') + reqs('dev_')},
    entry_points={'nbdev': [f'{lib}={lib}._modidx:d'], 'console_scripts': shlex.split(cfg['console_scripts'])},
)
