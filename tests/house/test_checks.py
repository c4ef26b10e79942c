"""The checks of tools/dev must be able to fail: each is shown something wrong."""

from pathlib import Path

import pytest

from house import cargo_rules, docs_paths, shell, source_rules


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty tree that the checks take for the project."""
    for module in (shell, source_rules, docs_paths, cargo_rules):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for module in (source_rules, docs_paths):
        monkeypatch.setattr(
            module,
            "tracked_files",
            lambda: sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()),
        )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_docs_that_name_a_missing_path_fail(tree: Path) -> None:
    write(tree / "crates/memory/src/walk.rs", "pub fn walk() {}\n")
    write(
        tree / "docs/page.md",
        "`crates/memory/src/walk.rs` and `crates/memory/src/walk.rs::walk` and [link](page.md) are there,\n"
        "`crates/memory/src/gone.rs` and `crates/memory/src/walk.rs::gone` and [link](gone.md) are not.\n",
    )
    assert docs_paths.check() == [
        "docs/page.md:2: `crates/memory/src/gone.rs` does not exist",
        "docs/page.md:2: `crates/memory/src/walk.rs` has no `gone`",
        "docs/page.md:2: the link to gone.md leads nowhere",
    ]


def test_docs_examples_are_not_paths_of_ours(tree: Path) -> None:
    write(
        tree / "README.md",
        "```console\n$ cat `docs/nothing`\n```\n`ringzero run` [web](https://example.org)\n",
    )
    assert docs_paths.check() == []


def test_unsafe_outside_its_places_fails(tree: Path) -> None:
    write(tree / "crates/memory/src/pool.rs", "fn f() {\n    unsafe { g() }\n}\n")
    write(tree / "crates/memory/src/bytes.rs", "//! The contract.\nfn f() { unsafe { g() } }\n")
    write(tree / "crates/memory/src/tlb.rs", "fn f() { unsafe { g() } }\n")
    found = source_rules.unsafe_in_its_places()
    assert len(found) == 2
    assert found[0].startswith("crates/memory/src/pool.rs:2: unsafe code outside")
    assert found[1].startswith("crates/memory/src/tlb.rs:1: a file with unsafe code opens with its contract")


def test_unsafe_in_words_is_not_unsafe_code(tree: Path) -> None:
    write(
        tree / "crates/memory/src/pool.rs",
        '//! unsafe is elsewhere\n/* unsafe\n */ const A: &str = "unsafe \\" unsafe";\n'
        'const B: &str = r#"unsafe "x" unsafe"#;\n',
    )
    assert source_rules.unsafe_in_its_places() == []


def test_a_crate_without_its_forbid_fails(tree: Path) -> None:
    write(tree / "crates/io/src/lib.rs", "//! devices\n")
    write(tree / "crates/x86/src/lib.rs", "//! facts\n#![forbid(unsafe_code)]\n")
    assert source_rules.unsafe_in_its_places() == [
        "crates/io/src/lib.rs: `#![forbid(unsafe_code)]` is missing"
    ]


def test_a_registry_host_fails(tree: Path) -> None:
    write(tree / "setup.sh", f"fetch https://{source_rules.REGISTRIES[0]}/x\n")
    assert source_rules.no_registry_hosts() == [
        f"setup.sh:1: names the registry host {source_rules.REGISTRIES[0]}"
    ]


def test_a_binary_fails(tree: Path) -> None:
    (tree / "tool").write_bytes(b"\x7fELF\xff\xfe")
    assert [line.split(":")[0] for line in source_rules.no_registry_hosts()] == ["tool"]


def test_a_long_file_is_named(tree: Path) -> None:
    write(tree / "long.rs", "\n" * (source_rules.LONG + 1))
    write(tree / "short.rs", "\n" * source_rules.LONG)
    assert [line.split(":")[0] for line in source_rules.long_files()] == ["long.rs"]


@pytest.mark.parametrize(
    ("crate", "manifest", "wrong"),
    [
        ("processor", {"dependencies": {"memory": {"workspace": True}}}, []),
        ("processor", {"dependencies": {"io": {"workspace": True}}}, ["crates/processor may not import io"]),
        ("io", {"dev-dependencies": {"ringzero-processor": "0.1"}}, ["crates/io may not import processor"]),
        ("x86", {"dependencies": {"p": {"package": "ringzero-host"}}}, ["crates/x86 may not import host"]),
        (
            "monitor",
            {"target": {"cfg(unix)": {"dependencies": {"pyo3": "1"}}}},
            ["crates/monitor names pyo3"],
        ),
        ("binding", {"dependencies": {"pyo3": "1", "monitor": {}}}, []),
        ("binding", {"dependencies": {"memory": {}}}, ["crates/binding may not import memory"]),
    ],
)
def test_import_rules_of_the_crates(
    crate: str, manifest: dict[str, dict[str, object]], wrong: list[str]
) -> None:
    found = cargo_rules.findings(crate, manifest)
    assert len(found) == len(wrong)
    assert all(line.startswith(start) for line, start in zip(found, wrong, strict=True))
