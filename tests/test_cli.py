"""Command line: run in the test process where possible, in subprocesses for pipes and signals."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mamba2_jax import Mamba2ForCausalLM, load_tokenizer, stream
from mamba2_jax.cli import commands as cli
from mamba2_jax.cli.generate import chosen_settings, prepare
from mamba2_jax.cli.kernels import describe_kernels
from mamba2_jax.cli.waiting import cache_folder, keep_compiled, working
from mamba2_jax.generation.options import Options
from mamba2_jax.generation.streaming import start_streams
from mamba2_jax.hub import EMBEDDED_MODEL

PROMPT = "import os\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model to change."""
    return shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")


def change(file, **fields):
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def run(*arguments) -> int:
    """The exit code, whether `main` returns it or tyro raises it."""
    try:
        return cli.main(list(arguments))
    except SystemExit as error:
        return error.code


@pytest.fixture
def from_stdin(monkeypatch):
    def put(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


def test_generate_streams_the_library_s_text(capsys):
    assert run("generate", PROMPT, "--max-new-tokens", "24") == 0
    out, err = capsys.readouterr()
    model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
    text = "".join(stream(model, tokenizer, PROMPT, max_new_tokens=24))
    assert out == (text if text.endswith("\n") else text + "\n")
    assert "loaded 38 tensors" in err
    assert "24 tokens, ended by --max-new-tokens" in err
    assert "tokens/s" in err
    assert "time to first token: " in err
    assert "with compiling" in err


def test_prompt_from_stdin_echo_stop_and_seed(capsys, from_stdin):
    options = ["--max-new-tokens", "16", "--temperature", "0.9", "--seed", "3", "--echo"]
    texts = []
    for more in ([], [], ["--stop", "\n", "--stop", "e"]):
        from_stdin(PROMPT.encode())
        assert run("generate", "-", *options, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(PROMPT)
    text = texts[0].removeprefix(PROMPT)
    assert texts[2] == PROMPT + text[: min(text.find(s) for s in "\ne" if s in text)] + "\n"


def test_a_draft_and_constraints(capsys, tmp_path):
    options = ["--max-new-tokens", "24", "--temperature", "1", "--regex", "([a-c]{2}é){3};", "--ban", "c"]
    assert run("generate", PROMPT, *options, "--draft", "prompt-lookup") == 0
    out, err = capsys.readouterr()
    assert re.fullmatch("([ab]{2}é){3};\n", out)
    assert "tokens per call of the model" in err
    (tmp_path / "schema.json").write_text('{"enum": ["left", "right"]}')
    for schema in ('{"enum": ["left", "right"]}', str(tmp_path / "schema.json")):
        assert run("generate", PROMPT, "--max-new-tokens", "24", "--json-schema", schema) == 0
        assert capsys.readouterr().out.strip() in ('"left"', '"right"')


def test_several_texts_of_beams(capsys, folder):
    change(folder / "generation_config.json", do_sample=True, temperature=0.7)  # for others
    options = ["--max-new-tokens", "8", "--num-beams", "2", "--num-return-sequences", "2", "--stop", ":"]
    assert run("generate", PROMPT, "--model", str(folder), "--dtype", "float32", *options) == 0
    out, err = capsys.readouterr()
    model, tokenizer = Mamba2ForCausalLM.from_pretrained(dtype="float32"), load_tokenizer()
    beams = Options(max_new_tokens=8, num_beams=2, num_return_sequences=2)
    texts = start_streams("test", model, tokenizer, tokenizer.encode(PROMPT), ":", beams)
    first, second = (text if text.endswith("\n") else text + "\n" for text in map("".join, texts))
    assert out == f"--- 1 of 2 ---\n{first}--- 2 of 2 ---\n{second}"
    assert "compiling included" in err


def test_compiled_programs_are_kept_for_the_next_start(tmp_path, monkeypatch):
    given = jax.config.jax_compilation_cache_dir
    assert given  # of these tests, which the command leaves alone
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir == given
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_enable_compilation_cache", False)
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_enable_compilation_cache", True)
        keep_compiled()
        (folder,) = (tmp_path / "mamba2_jax" / "compiled").iterdir()
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert jax.config.jax_compilation_cache_max_size > 0
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # where nothing can be written
        keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        for name, value in before.items():
            jax.config.update(name, value)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().is_relative_to(Path.home())


def test_a_status_line_is_for_terminals_only(capsys, monkeypatch):
    with working("reading"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with working("reading"):
        pass
    out, err = capsys.readouterr()
    assert (out, "reading" in err) == ("", True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate"], "Missing from mamba2-jax generate"),
        (["generate", "x", "--model", "/no/such"], "/no/such: no such folder"),
        (["generate", "x", "--model", ""], "the path is empty"),
        (["generate", "x", "--model", __file__], "this is a file"),
        (["generate", "x", "--tempe", "1"], "Perhaps you meant"),
        (["generate", "x", "--dtype", "float8"], "invalid choice 'float8'"),
        (["generate", "x", "--temperature", "hot"], "--temperature"),
        (["generate", "x", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["generate", "x", "--temperature", "nan"], "temperature=nan must be at least 0"),
        (["generate", "x", "--temperature", "1", "--top-p", "1.5"], "top_p=1.5 must be in (0, 1]"),
        (["generate", "x", "--temperature", "1", "--min-p", "2"], "min_p=2.0 must be in [0, 1]"),
        (["generate", "x", "--temperature", "1", "--top-k", "-1"], "top_k=-1 must be"),
        (["generate", "x", "--top-p", "0.5"], "needs sampling: set temperature"),
        (["generate", "x", "--repetition-penalty", "0"], "repetition_penalty=0.0 must be positive"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["generate", "x", "--max-new-tokens", "1.5"], "--max-new-tokens"),
        (["generate", "x", "--seed", "-1"], "--seed -1 must lie in"),
        (["generate", "x", "--stop", ""], "--stop is empty"),
        (["generate", "x", "--ban", ""], "--ban is empty"),
        (["generate", "x", "--presence-penalty", "nan"], "penalize_repeats: presence=nan"),
        (["generate", "x", "--frequency-penalty", "inf"], "penalize_repeats: frequency=inf"),
        (["generate", "x", "--regex", "(a"], "match_regex: '(a' cannot be followed"),
        (["generate", "x", "--json-schema", "/no/such"], "/no/such"),
        (["generate", "x", "--json-schema", "{"], "match_json_schema: the schema cannot be followed"),
        (["generate", "x", "--regex", "a", "--json-schema", "{}"], "--regex and --json-schema: a text"),
        (["generate", "x", "--draft", "/no/such"], "/no/such: no such folder"),
        (["generate", "x", "--num-draft-tokens", "2"], "--num-draft-tokens needs --draft"),
        (["generate", "x", "--draft", "prompt-lookup", "--num-draft-tokens", "0"], "num_draft_tokens=0"),
        (["generate", "x", "--length-penalty", "2"], "--length-penalty needs --num-beams above 1"),
        (["generate", "x", "--num-beams", "0"], "num_beams=0 must be at least 1"),
        (["generate", "x", "--num-beams", "2", "--temperature", "1"], "does not go with temperature"),
        (["generate", "x", "--best-of", "2"], "best_of=2 greedy texts of a prompt would be the same"),
        (["generate", "x", "--num-return-sequences", "2"], "num_return_sequences=2 greedy texts"),
        (["chat", "--num-return-sequences", "2"], "Unrecognized options"),
        (["generate", "x", "--chat"], "no chat template; give a file of one with --chat-template"),
        (["generate", "x", "--chat", "--chat-template", "/no/such"], "/no/such"),
        (["generate", "x", "--system", "Be brief."], "--system needs --chat"),
        (["generate", "x", "--chat-template", "a"], "--chat-template needs --chat"),
        (["chat"], "no chat template; give a file of one with --chat-template"),
        (["chat", "--seed", "-1"], "--seed -1 must lie in"),
        (["info", "/no/such"], "/no/such: no such folder"),
        (["info", "a", "b"], "Unrecognized options: b"),
        (["translate"], "Available subcommands: generate, chat, info, convert"),
        ([], "Missing subcommand"),
    ],
)
def test_a_mistake_gets_a_message_and_exit_code_2(arguments, words, capsys):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "prompt on stdin is empty"), (b"\xff", "prompt on stdin is not UTF-8")]
)
def test_a_mistake_on_stdin(data, words, capsys, from_stdin):
    from_stdin(data)
    assert run("generate", "-") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", "junk", "model.safetensors: 4 bytes"),
        ("config.json", "{", "config.json: cannot be read as JSON"),
        ("config.json", '{"model_type": "llama"}', "llama"),
        ("tokenizer.json", "{", "tokenizer"),
        ("generation_config.json", "{", "generation_config.json: cannot be read as JSON"),
        ("generation_config.json", "[]", "generation_config.json: wants a JSON object"),
        ("generation_config.json", '{"top_k": "5"}', "generation_config.json: top_k='5'"),
        ("generation_config.json", '{"do_sample": true, "top_p": 7}', "generation_config.json: top_p=7"),
        ("generation_config.json", '{"eos_token_id": 1e9}', "eos_token_id"),
    ],
)
def test_a_broken_checkpoint_gets_a_message_and_exit_code_2(name, content, words, folder, capsys):
    (folder / name).unlink()
    (folder / name).write_text(content)
    assert run("generate", "x", "--model", str(folder)) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_options_win_over_the_checkpoint_s_defaults(folder):
    change(
        folder / "generation_config.json",
        do_sample=True,
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        max_new_tokens=9,
        repetition_penalty=1.2,
    )
    theirs = {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
    }
    assert chosen_settings(cli.Generate("x"), folder) == theirs
    assert chosen_settings(cli.Generate("x", top_p=0.5, max_new_tokens=3), folder) == theirs | {
        "top_p": 0.5,
        "max_new_tokens": 3,
    }
    no_limit = {name: value for name, value in theirs.items() if name != "top_k"}
    assert chosen_settings(cli.Generate("x", top_k=0), folder) == no_limit
    greedy = {
        "temperature": 0,
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
    }
    assert chosen_settings(cli.Generate("x", temperature=0), folder) == greedy
    # transformers' rule: without do_sample the temperature and the filters beside it mean nothing
    change(folder / "generation_config.json", do_sample=False)
    assert "temperature" not in chosen_settings(cli.Generate("x"), folder)
    (folder / "generation_config.json").unlink()
    assert chosen_settings(cli.Generate("x"), folder) == {"max_new_tokens": 128}


@pytest.mark.parametrize(("derived", "ends"), [({}, (7, 9, 0)), ({"_from_model_config": True}, (0,))])
def test_the_tokenizer_s_end_wins_over_the_config_s_and_joins_the_generation_config_s(
    folder, capsys, derived, ends
):
    change(folder / "config.json", eos_token_id=5)
    change(folder / "generation_config.json", eos_token_id=[7, 9], **derived)
    begin, _ = prepare(cli.Generate("x", model=str(folder)), "x", cli._tell)
    err = capsys.readouterr().err
    assert "note: eos_token_id: the config says 5, the tokenizer 0; using 0" in err
    assert begin(1)[0]._eos == ends


def test_info_of_the_embedded_model(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    for words in ("2,776,928", "8 of 64 channels", "555,012 bytes", "38 tensors: 2,776,832 BF16, 96 F32"):
        assert words in out


def test_info_without_weights_and_of_a_hybrid(folder, capsys):
    original = {"d_model": 192, "n_layer": 6, "vocab_size": 4098, "ssm_cfg": {"layer": "Mamba2"}}
    original |= {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True}}
    (folder / "config.json").write_text(json.dumps(original))
    (folder / "model.safetensors").unlink()
    assert run("info", str(folder)) == 0
    out = capsys.readouterr().out
    assert "layers 1: 4 heads of 48 channels" in out
    assert "2 are padding" in out
    assert "no weights here" in out
    (folder / "model.safetensors").write_text("junk")
    assert run("info", str(folder)) == 2
    assert "model.safetensors: 4 bytes" in capsys.readouterr().err


def test_info_of_the_kernels_here(capsys):
    assert run("info", "--kernels") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the scan on cpu, with jax" in out
    assert "mamba2-2.7b, float16 mamba2-2.7b, float32 tiny-python, bfloat16 tiny-python, float32" in out
    assert "runs unasked xla mosaic_gpu no: it needs an NVIDIA GPU" in out
    assert run("info", "--kernels", "/no/such") == 2
    assert "/no/such: no such folder" in capsys.readouterr().err


def test_info_of_the_kernels_on_other_devices(capsys, monkeypatch):
    def kernel(capability, dtypes):
        def unsupported(problem):
            if problem.compute_capability != capability:
                return "another GPU"
            return None if problem.dtype in dtypes else f"x is {problem.dtype}"

        return SimpleNamespace(automatic=(capability,), unsupported=unsupported)

    table = {"fast": kernel((9, 0), ("bfloat16", "float16")), "old": kernel((8, 9), ("float32", "float16"))}
    monkeypatch.setattr("mamba2_jax.ops.scan.dispatch.kernels", {"ssd": table}.get)
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100")
    ada = SimpleNamespace(platform="gpu", compute_capability="8.9", device_kind="NVIDIA L4")
    describe_kernels(None, [hopper, hopper, ada])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("NVIDIA H100, compute capability 9.0") == 1
    on_hopper, on_ada = out.split("NVIDIA L4, compute capability 8.9")
    assert "tiny-python, bfloat16 runs unasked fast fast can run old no: another GPU" in on_hopper
    assert "tiny-python, float32 runs unasked xla fast no: x is float32 old no: another GPU" in on_hopper
    assert "mamba2-2.7b, float16 runs unasked old fast no: another GPU old can run" in on_ada
    assert "tiny-python, float32 runs unasked xla fast no: another GPU old can run, by name only" in on_ada
    assert "tiny-python, bfloat16 runs unasked xla fast no: another GPU old no: x is bfloat16" in on_ada


def test_help_and_version(capsys):
    for arguments in (["--help"], ["generate", "--help"], ["info", "--help"], ["--version"]):
        assert run(*arguments) == 0
        assert "mamba2-jax" in capsys.readouterr().out


def start(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "mamba2_jax.cli", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


@pytest.fixture
def heard_interrupts():
    """Ctrl-C reaches what a test starts: a job in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize(("leave", "code"), [("interrupt", 130), ("close the pipe", 141)])
def test_leaving_early_is_quiet(leave, code):
    with start("generate", PROMPT, "--max-new-tokens", "1000000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4)
        if leave == "interrupt":
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(timeout=120) == code
    assert err.startswith("loaded 38 tensors")
    assert len(err.splitlines()) == 1
