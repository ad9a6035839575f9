"""The DLRM recipe: its data, its command line, and one short training."""

import collections
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked_python import python
from harness_recipes import (
    assert_same_state,
    interrupt_preparation,
    last_checkpoint,
    signal_when,
)
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score

from official_recipes.dlrm import prepare_data, raw_rows, synthetic, train, vocabulary
from official_recipes.dlrm.prepare_data import main

ROOT = Path(__file__).resolve().parents[1]


def _row(label=0, dense=range(13), categories=None, **changes):
    fields = [str(label), *map(str, dense), *(categories or [f"{i:08x}" for i in range(26)])]
    for index, value in changes.items():
        fields[int(index.removeprefix("f"))] = value
    return "\t".join(fields)


def _prepare(tmp_path, rows, *arguments, out="out"):
    source = tmp_path / "rows.txt"
    if rows is not None:
        source.write_text("".join(f"{row}\n" for row in rows))
    folder = tmp_path / out
    code = main(["prepare_data", f"--source={source}", f"--output_dir={folder}", *arguments])
    return code, folder


def _written(folder, split="train"):
    files = sorted(folder.glob(f"{split}-*.tsv"))
    return [line.split("\t") for f in files for line in f.read_text().splitlines()]


def _record(folder):
    return json.loads((folder / "dataset.json").read_text())


# -- rows ------------------------------------------------------------------------------------------


def test_numbers(tmp_path):
    dense = ["0", "1", "9", "-1", "-7", "", "100", "3", "3", "3", "3", "3", "1000000"]
    code, out = _prepare(
        tmp_path, [_row(1, dense)], "--ids=hashed", "--validation_fraction=0", "--shards=1"
    )
    assert code == 0
    ((label, *fields),) = _written(out)
    expected = np.log1p(np.maximum([float(x or 0) for x in dense], 0))
    np.testing.assert_allclose([float(x) for x in fields[:13]], expected, rtol=1e-6)
    assert label == "1"


def test_frequent_categories(tmp_path):
    """In the training rows they are counted; held out, the same ids."""
    first = ["aa", "aa", "aa", "bb", "bb", "cc", "", "", "cc", "longer than eight", "aa"]
    first += ["longer than eight"] * 2 + ["longer than some"]
    train = [_row(f14=value) for value in first]
    valid = tmp_path / "valid.txt"
    valid.write_text("".join(_row(f14=v) + "\n" for v in ("zz", "aa", "cc", "longer than eight")))
    code, out = _prepare(
        tmp_path, train, "--min_frequency=3", f"--validation_source={valid}", "--shards=1"
    )
    assert code == 0
    ids = [row[14] for row in _written(out)]
    of = dict(zip(first, ids, strict=True))
    assert len(ids) == len(first)
    assert sorted({of["aa"], of["longer than eight"]}) == ["1", "2"]
    assert of["bb"] == of["cc"] == of[""] == of["longer than some"] == "0"
    assert [row[14] for row in _written(out, "validation")] == [
        *["0", of["aa"], "0", of["longer than eight"]]
    ]
    sizes = _record(out)["vocab_sizes"]
    assert sizes == [3] + [2] * 25  # all others have one value, in every row
    for row in _written(out):
        assert all(int(i) < size for i, size in zip(row[14:], sizes, strict=True))


def test_hashed_categories(tmp_path):
    values = ["", *(f"{i:08x}" for i in range(5000))]
    rows = [_row(f14=value, f15=value) for value in values]
    code, out = _prepare(
        *(tmp_path, rows, "--ids=hashed", "--buckets=20", "--validation_fraction=0", "--shards=1")
    )
    assert code == 0
    written = np.array([[int(row[14]), int(row[15])] for row in _written(out)])
    assert sorted(map(tuple, written.tolist())).count((0, 0)) == 1  # the missing one
    written = np.array([[0, 0], *(row for row in written.tolist() if row != [0, 0])])
    assert written[1:].min() == 1
    assert written[1:].max() == 19
    for column in (0, 1):
        assert chisquare(np.bincount(written[1:, column], minlength=20)[1:]).pvalue > 1e-4
    assert np.mean(written[1:, 0] == written[1:, 1]) < 0.1  # another hash in each column
    assert _record(out)["vocab_sizes"] == [20] * 26


def test_no_row_is_lost_or_twice(tmp_path):
    rows = [_row(dense=[i, *[0] * 12]) for i in range(3000)]
    arguments = ["--validation_fraction=0.2", "--test_fraction=0.1", "--shards=5"]
    code, out = _prepare(tmp_path, rows, *arguments, "--ids=hashed")
    assert code == 0
    splits = {
        s: [round(np.expm1(float(r[1]))) for r in _written(out, s)] for s in _record(out)["rows"]
    }
    assert sorted(itertools.chain(*splits.values())) == list(range(3000))
    assert {split: len(found) for split, found in splits.items()} == _record(out)["rows"]
    assert [len(splits[s]) / 3000 for s in ("validation", "test")] == pytest.approx(
        [0.2, 0.1], abs=0.03
    )
    files = sorted(out.glob("train-*"))
    assert [f.name for f in files] == [f"train-{i:05d}-of-00005.tsv" for i in range(5)]
    assert min(len(f.read_text().splitlines()) for f in files) > 350
    again, other = (
        _prepare(tmp_path, None, *arguments, "--ids=hashed", seed, out=f"out{seed[-1]}")[1]
        for seed in ("--seed=1", "--seed=2")
    )
    assert _written(again) == _written(out)
    assert sorted(_written(other)) != sorted(_written(out))


def test_compressed_and_several_files(tmp_path):
    for part in range(3):
        content = "".join(_row(dense=[100 * part + i, *[0] * 12]) + "\r\n" for i in range(100))
        with gzip.open(tmp_path / f"day_{part}.gz", "wt", newline="") as file:
            file.write(content)
    out = tmp_path / "out"
    arguments = ["--validation_fraction=0", "--min_frequency=1", f"--output_dir={out}"]
    assert main(["prepare_data", f"--source={tmp_path}/day_*.gz", *arguments]) == 0
    assert sorted(round(np.expm1(float(r[1]))) for r in _written(out)) == list(range(300))
    assert _record(out)["vocab_sizes"] == [2] * 26


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (_row() + "\tmore", "expected 40 fields separated by TABs, received 41"),
        ("0\t1\t2", "expected 40 fields separated by TABs, received 3"),
        ("", "expected 40 fields separated by TABs, received 1"),
        (_row(label=2), "expected 0 or 1 in field 1, received '2'"),
        (_row(label=""), "expected 0 or 1 in field 1, received ''"),
        (_row(f3="1.5"), "expected an integer in field 4, received '1.5'"),
        (_row(f13="1_0"), "expected an integer in field 14, received '1_0'"),
        (_row(f1="nan"), "expected an integer in field 2, received 'nan'"),
        (_row(f2="1" * 400), f"expected an integer in field 3, received '{40 * '1'}'..."),
        (_row(f2="1" * 5000), f"expected an integer in field 3, received '{40 * '1'}'..."),
    ],
)
def test_malformed_rows(tmp_path, bad, said, capsys):
    rows = [_row(1), _row(), bad, _row(), bad, _row()]
    code, out = _prepare(tmp_path, rows)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(error) == 1
    assert f"rows.txt, line 3: {said}" in error[0]
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    code, out = _prepare(tmp_path, rows, "--skip_malformed", "--validation_fraction=0")
    assert code == 0
    assert "left 2 malformed rows out" in capsys.readouterr().err
    assert len(_written(out)) == _record(out)["rows"]["train"] == 4
    assert _record(out)["skipped_rows"] == 2
    assert _record(out)["clicks"]["train"] == 1


def test_lines_are_numbered_across_chunks_and_from_1_in_each_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(raw_rows, "CHUNK_BYTES", 1000)
    (tmp_path / "a").write_text("".join(_row() + "\n" for _ in range(40)))
    (tmp_path / "b").write_text("".join(_row() + "\n" for _ in range(57)) + "no row")
    out = f"--output_dir={tmp_path / 'out'}"
    assert main(["prepare_data", f"--source={tmp_path}/a,{tmp_path}/b", out]) == 2
    assert f"{tmp_path}/b, line 58: expected 40 fields" in capsys.readouterr().err


def test_mistakes_end_in_one_line(tmp_path, capsys):
    good = tmp_path / "good"
    good.write_text(_row() + "\n")
    (tmp_path / "empty").touch()
    with gzip.open(tmp_path / "whole.gz", "wb") as file:
        file.write(os.urandom(100_000))
    (tmp_path / "broken.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:50_000])
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    new = tmp_path / "new"
    bad = tmp_path / "bad"
    bad.write_text("no row\n" * 3)
    (tmp_path / "table.csv").write_text('a,b,d e\n1,"x\ny",3\nx,z,3\n')
    table = [f"--source={tmp_path}/table.csv", "--label=a", "--categorical=b"]
    for arguments, said in (
        ([f"--source={tmp_path}/nowhere*"], "--source: expected files or patterns"),
        ([f"--source={tmp_path}"], "which is a folder"),
        ([], "--source: expected files, or --synthetic_rows instead, received neither"),
        ([f"--source={good}", "--synthetic_rows=5"], "received both"),
        (["--synthetic_rows=5", f"--test_source={good}"], "--synthetic_rows: expected"),
        ([f"--source={good}", "--ids=some"], "--ids: expected one of frequency, hashed"),
        ([f"--source={good}", "--buckets=1"], "--buckets: expected an integer"),
        ([f"--source={good}", "--shards=1000"], "--shards: expected an integer from 1 to 512"),
        ([f"--source={good}", "--validation_fraction=1"], "--validation_fraction: expected"),
        (
            [f"--source={good}", "--validation_fraction=0.6", "--test_fraction=0.6"],
            "--test_fraction: expected less than 1",
        ),
        ([f"--source={good}", "--min_frequency=x"], "--min_frequency: expected"),
        ([f"--source={good}", f"--output_dir={full}"], "--output_dir: expected a folder that is"),
        ([f"--source={good}", "--output_dir="], "--output_dir: expected a path"),
        ([f"--source={tmp_path}/empty"], "--source has no rows to train on"),
        ([f"--source={good}", f"--test_source={tmp_path}/empty"], "no row of 1 is held out"),
        (["--synthetic_rows=3"], "no row of 3 is held out: expected more rows, or a --validation"),
        (
            [f"--source={good}", f"--validation_source={tmp_path}/empty"],
            "--validation_source has no rows",
        ),
        ([f"--source={tmp_path}/broken.gz"], "broken.gz"),
        (
            [f"--source={good}", f"--validation_source={tmp_path}/./good"],
            "--validation_source: expected files that are not in --source, received",
        ),
        (
            [f"--source={tmp_path}/e*", f"--test_source={good}", f"--validation_source={good}"],
            "--test_source: expected files that are not in --validation_source",
        ),
        (
            [f"--source={bad}", "--skip_malformed"],
            f"all rows of --source are malformed; the first: {bad}, line 1: expected 40 fields",
        ),
        (
            [
                f"--source={good}",
                f"--test_source={bad}",
                "--skip_malformed",
                "--validation_fraction=0",
            ],
            f"all rows of --test_source are malformed; the first: {bad}, line 1",
        ),
        ([f"--source={good}", "--numeric=a"], "--numeric: expected no value without --label"),
        (["--synthetic_rows=5", "--label=a"], "--label: expected no value with --synthetic_rows"),
        ([*table, "--label=c"], "--label: expected one of the columns of the data (a, b, d e)"),
        ([*table, "--numeric=x*"], "--numeric: expected columns of the data (a, b, d e), received"),
        ([*table, "--numeric=b"], "--categorical: expected columns that are not in --numeric"),
        ([*table, "--categorical=a"], "--categorical: expected columns that are not in --label"),
        ([*table, "--categorical="], "--categorical: expected at least one column"),
        ([*table, "--multi_hot=a"], "--multi_hot: expected columns of --categorical (b), received"),
        (
            [*table, "--multi_hot_limit=3"],
            "--multi_hot_limit: expected no value without --multi_hot",
        ),
        ([*table, "--multi_hot=b", "--multi_hot_limit=0"], "--multi_hot_limit: expected"),
        ([*table, "--multi_hot=b", "--multi_hot_separator="], "expected at least one character"),
        ([f"--source={good}", "--multi_hot=a"], "--multi_hot: expected no value without --label"),
        ([*table, "--delimiter=::"], "--delimiter: expected one of comma, tab, semicolon, space"),
        ([*table, "--numeric_scale=x"], "--numeric_scale: expected one of log, none"),
        ([*table, "--clicks_from=nan"], "--clicks_from: expected a number"),
        ([*table, "--columns=a,b,b"], "--columns: expected different names, received a,b,b"),
        ([*table, "--columns=a,b"], "table.csv, line 1: expected 2 fields separated by ','"),
        ([*table], f"{tmp_path}/table.csv, line 4: expected a number in 'a', received 'x'"),
        ([*table, "--delimiter=tab"], "--label: expected one of the columns of the data (a,b,d e)"),
        ([f"--source={tmp_path}/empty", *table[1:]], "expected names of columns in the first line"),
        (
            [f"--source={tmp_path}/table.csv", *table[1:], f"--test_source={good}"],
            f"{good}: expected a column 'a' as in the first file of --source",
        ),
    ):
        given = ["prepare_data", *arguments]
        if not any(a.startswith("--output_dir") for a in arguments):
            given.append(f"--output_dir={new}")
        assert main(given) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert said in error[0]
        assert not new.exists()
        assert not (tmp_path / ".new.partial").exists()


# -- other columns ---------------------------------------------------------------------------------


def _tables(tmp_path, files, *arguments):
    """Prepares files of text, whose names and contents are given."""
    for name, content in files.items():
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    first = next(iter(files))
    out = tmp_path / "out"
    fixed = ["--validation_fraction=0", "--shards=1", "--min_frequency=1", f"--output_dir={out}"]
    code = main(["prepare_data", f"--source={tmp_path / first}", *fixed, *arguments])
    assert code == 0
    return _written(out), _record(out)


def test_csv_with_a_header(tmp_path):
    """Compressed, with a mark at its beginning, quotes, floats, missing values and empty lines."""
    content = "\ufeffid,click,price,site,age\r\n"
    content += '7,1,2.5,"a,""b""",\r\n\r\n8,0,-1e1,"two\nlines",30\r\n9,1.0,,é,3\r\n'
    rows, record = _tables(
        *(tmp_path, {"a.csv.gz": content}),
        *("--label=click", "--numeric=price,age", "--categorical=site"),
    )
    assert [row[0] for row in rows] == ["1", "0", "1"]
    numbers = [[float(x) for x in row[1:3]] for row in rows]
    expected = np.log1p([[2.5, 0], [0, 30], [0, 3]])
    np.testing.assert_allclose(numbers, expected, rtol=1e-6)
    assert sorted(row[3] for row in rows) == ["1", "2", "3"]
    assert record["num_dense_features"] == 2
    assert record["vocab_sizes"] == [4]
    columns = {"label": "click", "numeric": ["price", "age"], "categorical": ["site"]}
    assert record["columns"] == columns


def test_tsv_without_a_header(tmp_path):
    """As MovieLens has ratings: there are no numbers, which the network needs one of."""
    rows, record = _tables(
        *(tmp_path, {"u.data": "196\t242\t3\t881250949\n186\t302\t4\t891717742\n"}),
        *("--columns=user,item,rating,time", "--delimiter=tab", "--label=rating"),
        *("--clicks_from=4", "--categorical=user,item"),
    )
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "0"]]
    assert (record["num_dense_features"], record["vocab_sizes"]) == (1, [3, 3])


def test_numbers_as_they_are_and_patterns(tmp_path):
    """A pattern takes what is not taken; files may have their columns in another order."""
    files = {"a": "I1,C1,y,I2\n-1.5,a,1,2\n", "b": "y,I2,I1,C1\n0,8,9,a\n1,0,bad,b\n"}
    rows, record = _tables(
        *(tmp_path, files, f"--test_source={tmp_path / 'b'}", "--skip_malformed"),
        *("--label=y", "--numeric=I*", "--categorical=*", "--numeric_scale=none"),
    )
    assert rows == [["1", "-1.5", "2", "1"]]
    assert _written(tmp_path / "out", "test") == [["0", "9", "8", "1"]]
    assert record["columns"]["categorical"] == ["C1"]
    assert record["skipped_rows"] == 1


def test_several_categories_of_a_row(tmp_path):
    """Each has an id, a missing one where there is none; other columns are as without them."""
    content = 'y,g,c\n1,a|b,x\n0,,x\n1,b||é|a,y\n0,"c|c",x\n1,a,y\n'
    fixed = ["--label=y", "--categorical=c,g", "--multi_hot=g*"]
    rows, record = _tables(tmp_path, {"a.csv": content}, *fixed)
    assert record["multi_hot_sizes"] == [1, 3]
    assert record["vocab_sizes"] == [3, 6]  # a missing one is a category too
    names = [[*name] for name in ("ab", "-", "béa", "cc", "a")]
    ids = [row[3].split(",") for row in rows]
    seen = {}
    for row, (given, texts) in enumerate(zip(ids, names, strict=True)):
        assert len(given) == len(texts), row
        for one, text in zip(given, texts, strict=True):
            assert seen.setdefault(text, one) == one
    assert len({*seen.values()}) == 5
    assert "0" not in seen.values()
    (tmp_path / "plain").mkdir()
    plain, _ = _tables(tmp_path / "plain", {"a.csv": content}, "--label=y", "--categorical=c")
    assert [row[:3] for row in rows] == plain


@pytest.mark.parametrize(("more", "most"), [([], 5), (["--multi_hot_limit=2"], 2)])
def test_several_categories_go_with_their_row(tmp_path, more, most):
    """To shards and to what is held out, whatever is between them."""
    rng = np.random.default_rng(0)
    rows = [rng.choice(30, 1 + index % 5).tolist() for index in range(300)]
    texts = [f"0,{number},{' ; '.join(map(str, row))}\n" for number, row in enumerate(rows)]
    (tmp_path / "a.csv").write_text("y,n,g\n" + "".join(texts))
    arguments = ["--label=y", "--numeric=n", "--numeric_scale=none", "--categorical=g", *more]
    arguments += ["--multi_hot=g", "--multi_hot_separator= ; ", "--min_frequency=1", "--shards=3"]
    out = tmp_path / "out"
    arguments += [f"--source={tmp_path / 'a.csv'}", f"--output_dir={out}"]
    assert main(["prepare_data", *arguments, "--validation_fraction=0.3"]) == 0
    assert _record(out)["multi_hot_sizes"] == [most]
    validation = _written(out, "validation")
    assert 60 < len(validation) < 120
    found = {int(number): ids for _, number, ids in _written(out) + validation}
    assert found.keys() == {*range(300)}
    seen = {}
    for number, row in enumerate(rows):
        ids = found[number].split(",")
        assert ids == [seen.setdefault(x, i) for x, i in zip(row[:most], ids, strict=True)]
    assert {*seen.values()} == {str(1 + index) for index in range(30)}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1,2", "expected 3 fields separated by ',', received 2"),
        ("2,1,a", "expected 0 or 1 in 'y', received '2'"),
        (",1,a", "expected 0 or 1 in 'y', received ''"),
        ("1,nan,a", "expected a number in 'n', received 'nan'"),
        ("1,1_0,a", "expected a number in 'n', received '1_0'"),
        (f"1,{400 * '1'},a", f"expected a number in 'n', received '{40 * '1'}'..."),
        ('1,2,"a"b', "expected fields as CSV has them, received: ',' expected after"),
        ('1,2,"a', "expected fields as CSV has them, received: unexpected end of data"),
    ],
)
def test_malformed_rows_of_tables(tmp_path, row, said, capsys):
    (tmp_path / "a.csv").write_text(f"y,n,c\n1,2,a\n\n{row}\n")
    arguments = [f"--source={tmp_path / 'a.csv'}", "--label=y", "--numeric=n", "--categorical=c"]
    arguments += [f"--output_dir={tmp_path / 'out'}", "--validation_fraction=0"]
    assert main(["prepare_data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}/a.csv, line 4: {said}" in error
    code = main(["prepare_data", *arguments, "--skip_malformed"])
    if "end of data" in said:  # which has taken all that follows
        assert code == 2
        return
    assert code == 0
    assert "left 1 malformed rows out" in capsys.readouterr().err
    assert _record(tmp_path / "out")["rows"]["train"] == 1


def test_criteo_rows_as_a_table(tmp_path):
    """The same files come of the same rows, whichever way they are read."""
    rows = [_row(i % 2, [i] * 13, [f"{i % 3:08x}"] * 26) for i in range(60)]
    names = ["label", *(f"I{i}" for i in range(13)), *(f"C{i}" for i in range(26))]
    source = tmp_path / "rows.txt"
    source.write_bytes(b"\xef\xbb\xbf" + "".join(f"{row}\n" for row in rows).encode())
    _, plain = _prepare(tmp_path, None, "--min_frequency=2")
    arguments = ["--label=label", "--numeric=I*", "--categorical=C*", "--delimiter=tab"]
    arguments.append(f"--columns={','.join(names)}")
    code, table = _prepare(tmp_path, None, "--min_frequency=2", *arguments, out="table")
    assert code == 0
    assert _written(table) == _written(plain)
    assert _written(table, "validation") == _written(plain, "validation")
    record = _record(table)
    assert record.pop("columns")["numeric"] == names[1:14]
    assert record == _record(plain)


def test_help_of_the_preparation(capsys):
    assert main(["prepare_data", "--help"]) == 0
    assert "--min_frequency" in capsys.readouterr().out


# -- memory ----------------------------------------------------------------------------------------


def test_counts_are_exact_within_the_limit(tmp_path):
    rng = np.random.default_rng(0)
    counter = vocabulary.FrequencyCounter(tmp_path, limit=20_000)
    expected = [collections.Counter() for _ in range(26)]
    spilled = 0
    for _ in range(60):
        keys = np.minimum(rng.zipf(1.3, (26, 100)), 2**40).astype(np.uint64)
        for column in range(26):
            expected[column].update(keys[column].tolist())
        counter.add(keys)
        spilled = max(spilled, len(list(tmp_path.iterdir())))
    distinct = sum(map(len, expected))
    assert distinct > 20_000
    assert spilled > 10
    for found, counts in zip(counter.frequent(3), expected, strict=True):
        assert found.tolist() == sorted(key for key, count in counts.items() if count >= 3)
    assert counter.most_in_memory <= 20_000 + 26 * 100
    assert not list(tmp_path.iterdir())


_MEASURE = """
import resource, sys
from official_recipes.dlrm import prepare_data, raw_rows
raw_rows.CHUNK_BYTES = 2 ** 18
code = prepare_data.main(["prepare_data", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Ten times the rows, each with categories of its own: the same memory, to a few MiB."""
    peaks, sizes = [], []
    for rows in (4_000, 40_000):
        source = tmp_path / f"{rows}.txt"
        with source.open("w") as file:
            for i in range(rows):
                categories = [f"{(i * 2654435761 + c * 97) % 2**32:08x}" for c in range(26)]
                file.write(_row(i % 2, [i] * 13, categories) + "\n")
        arguments = [f"--source={source}", f"--output_dir={tmp_path / f'out{rows}'}"]
        result = subprocess.run(
            [sys.executable, "-c", _MEASURE, *arguments, "--counts_in_memory=100000"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(result.stdout.splitlines()[-1]) / 1024)
        sizes.append(source.stat().st_size / 2**20)
    assert sizes[1] - sizes[0] > 10
    assert peaks[1] - peaks[0] < 8


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_preparation_leaves_nothing_that_looks_whole(tmp_path, number):
    out = tmp_path / "out"
    interrupt_preparation("dlrm", ["--synthetic_rows=10000000", "--ids=hashed"], out, number)
    assert main(["prepare_data", "--synthetic_rows=100", f"--output_dir={out}"]) == 0
    assert not (tmp_path / ".out.partial").exists()
    assert sum(_record(out)["rows"].values()) == 100


# -- made-up clicks --------------------------------------------------------------------------------


def _sampled(rows, seed=5):
    model = synthetic.ClickModel(seed)
    parts = list(model.lines(rows, lambda _: None))
    lines = [line for part in parts for line in part.lines]
    return lines, np.concatenate([part.logits for part in parts])


def test_made_up_rows_follow_the_planted_weights():
    lines, logits = _sampled(25_000)
    assert len(lines) == len(logits) == 25_000
    clicks = np.array([line.startswith(b"1\t") for line in lines])
    chance = 1 / (1 + np.exp(-logits))
    assert np.mean(clicks) == pytest.approx(synthetic.CLICK_RATE, abs=0.02)
    for low, high in itertools.pairwise([0, 0.1, 0.2, 0.4, 0.6, 1]):
        chosen = (chance >= low) & (chance < high)
        spread = np.sqrt(chance[chosen].mean() / chosen.sum())
        assert clicks[chosen].mean() == pytest.approx(chance[chosen].mean(), abs=4 * spread)
    assert _sampled(25_000)[0] == lines
    assert _sampled(25_000, seed=6)[0] != lines
    chunk = raw_rows.parse(raw_rows.Lines("", 1, lines), raw_rows.DenseTexts())
    assert any((keys == 0).any() for keys in chunk.keys)
    assert any(b"" in line.split(b"\t")[1:14] for line in lines)


def test_the_best_auc_is_that_of_the_true_chances():
    lines, logits = _sampled(20_000)
    clicks = np.array([line.startswith(b"1\t") for line in lines])
    best = synthetic.BayesAUC()
    for part in np.array_split(np.arange(20_000), 3):
        best.add(logits[part], clicks[part])
    assert best.of_these_clicks == pytest.approx(roc_auc_score(clicks, logits), abs=1e-5)
    chance = 1 / (1 + np.exp(-logits))
    drawn = [
        roc_auc_score(np.random.default_rng(i).random(20_000) < chance, logits) for i in range(20)
    ]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert best.expected == pytest.approx(np.mean(drawn), abs=4 * error)
    assert 0.75 < best.expected < 0.95


def test_made_up_data_set(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare_data", "--synthetic_rows=12345", f"--output_dir={out}"]) == 0
    record = _record(out)
    assert sum(record["rows"].values()) == 12345
    best = record["bayes_auc"]["validation"]["of_these_clicks"]
    assert f"best possible AUC on the validation rows: {best:.4f}" in capsys.readouterr().out
    lines, logits = _sampled(12345, seed=1)
    held_out = prepare_data.uniform(np.arange(12345, dtype=np.uint64), 2) < 0.05
    clicks = np.array([line.startswith(b"1\t") for line in lines])
    assert record["rows"]["validation"] == held_out.sum()
    assert best == pytest.approx(roc_auc_score(clicks[held_out], logits[held_out]), abs=1e-4)


def test_real_rows(shared_data, tmp_path):
    folder = shared_data / "criteo"
    if not folder.is_dir():
        pytest.skip("no Criteo sample in the folder of data sets")
    out = tmp_path / "out"
    arguments = [
        f"--source={folder / 'train.csv'}",
        f"--validation_source={folder / 'dev.csv'}",
        f"--test_source={folder / 'test.csv'}",
        f"--output_dir={out}",
    ]
    assert main(["prepare_data", *arguments, "--min_frequency=4"]) == 0
    record = _record(out)
    assert record["rows"] == {"train": 7200, "validation": 409, "test": 391}
    raw = [line.split("\t") for line in (folder / "train.csv").read_text().splitlines()]
    assert record["clicks"]["train"] == sum(row[0] == "1" for row in raw)
    for column, size in enumerate(record["vocab_sizes"]):
        counts = collections.Counter(row[14 + column] for row in raw)
        assert size == 1 + sum(count >= 4 for count in counts.values())


# -- the command line ------------------------------------------------------------------------------

SMALL = """
task:
  model: {embedding_dim: 4, bottom_mlp: [8, 4], top_mlp: [8, 1]}
  train_data: {input_path: DATA/train*, global_batch_size: 64}
  validation_data: {input_path: DATA/validation*, global_batch_size: 64}
trainer:
  train_steps: 8
  steps_per_loop: 2
  summary_interval: 2
  checkpoint_interval: 2
  validation_interval: 8
  optimizer_config:
    optimizer: {type: sgd}
    learning_rate: {type: constant, constant: {learning_rate: 0.5}}
    warmup: {linear: {warmup_steps: 2}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks") / "data"
    assert main(["prepare_data", "--synthetic_rows=4000", f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def small(tmp_path, data):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.replace("DATA", str(data)))
    return [f"--config_file={file}", f"--model_dir={tmp_path / 'model'}", "--cpu_replicas=2"]


def _command(*arguments):
    return [*python(), "-m", "official_recipes.dlrm.train", *arguments]


def _environment():
    return {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}


def _run(*arguments):
    return subprocess.run(
        _command(*arguments), cwd=ROOT, capture_output=True, text=True, env=_environment()
    )


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_task(which):
    """The tests that need the old Keras behind tf.keras."""
    result = subprocess.run(
        [
            *[*python(), "-m", "pytest", "-q", "-x", "-m", which],
            str(ROOT / "tests" / "legacy_keras_dlrm.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


_KIND = "--params_override=trainer.optimizer_config"
_DEEPER = "task.model.top_mlp=[8,8,1]"
# One after the other; {} is a folder, the first part of each what is said.
RUNS = [
    ("one that does not extrapolate", [f"{_KIND}.optimizer.type=extrap_sgd"]),
    ("--experiment: expected a registered experiment", ["--experiment=dlrm_criteo"]),
    (
        "task.init_checkpoint: a checkpoint, or a run's model_dir, received '{}'",
        ["--params_override=task.init_checkpoint={}"],
    ),
    # Nothing is left by what failed and by a dry run; then a whole run.
    (None, ["--dry_run"]),
    (None, []),
    (
        "task.init_checkpoint: a checkpoint of the same model, received {}/model/ckpt-8",
        [
            f"--params_override=task.init_checkpoint={{}}/model,{_DEEPER}",
            "--model_dir={}/other",
        ],
    ),
    (
        "--model_dir: expected a new folder, or one with checkpoints of the same model, received",
        [f"--params_override={_DEEPER}"],
    ),
    (
        "the same optimizer, vr_sgd (or --new_optimizer, to go on with this one), "
        "received {}/model/ckpt-8 of sgd",
        [f"{_KIND}.optimizer.type=vr_sgd"],
    ),
    (
        "the same optimizer, sgd (embeddings: adagrad) (or",
        [f"{_KIND}.embeddings.optimizer.type=adagrad"],
    ),
    (
        "with checkpoints of the same model, received {}/model/ckpt-8",
        ["--mode=eval", f"--params_override={_DEEPER}"],
    ),
    ("--cpu_replicas: expected as many as in what this process has run", ["--cpu_replicas=3"]),
    (None, ["--mode=eval", f"{_KIND}.optimizer.type=adagrad"]),
]
# All in one process: it takes longest to import. The last run is made as by `python -m`.
SEVERAL_RUNS = """
import json, os, runpy, sys
from official_recipes.dlrm import train
*runs, last = json.loads(sys.argv[1])
model_dir, codes, there = sys.argv[2], [], []
for arguments in runs:
    codes.append(train.main(["train", *arguments]))
    there.append(sorted(os.listdir(model_dir)) if os.path.isdir(model_dir) else None)
print(json.dumps([codes, there]), flush=True)
sys.argv[1:] = last
del sys.modules["official_recipes.dlrm.train"]
runpy.run_module("official_recipes.dlrm.train", run_name="__main__", alter_sys=True)
"""


def test_mistakes_and_runs_between_them(small, tmp_path):
    """A mistake is one line, and changes nothing in the folder; neither does a dry run.

    The program trains and evaluates, without anything in the environment, and leaves a summary.
    """
    runs = [
        [*small, *(argument.replace("{}", str(tmp_path)) for argument in arguments)]
        for _, arguments in RUNS
    ]
    model_dir = tmp_path / "model"
    result = subprocess.run(
        [*python(), "-c", SEVERAL_RUNS, json.dumps(runs), str(model_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=_environment(),
    )
    assert result.returncode == 0, result.stderr
    (made,) = (line for line in result.stdout.splitlines() if line.startswith("[["))
    codes, there = json.loads(made)
    codes.append(result.returncode)
    there.append(sorted(path.name for path in model_dir.iterdir()))
    mistakes = [said.replace("{}", str(tmp_path)) for said, _ in RUNS if said is not None]
    assert codes == [0 if said is None else 2 for said, _ in RUNS], result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("--")]
    assert len(errors) == len(mistakes)
    for error, said in zip(errors, mistakes, strict=True):
        assert said in error
    assert not (tmp_path / "other").exists()

    dry = 3
    assert there[: dry + 1] == [None] * (dry + 1)
    assert "summary.json" in there[dry + 1]
    assert all(names == there[dry + 1] for names in there[dry + 1 : -1])
    assert {*there[-1]} == {*there[dry + 1], "evaluation.json"}
    for said in (
        "dry run of large_batch_dlrm: two steps, nothing is written",
        "devices: 2 replicas; on this worker CPU:0, CPU:1",
        "batch: 64 in a step, 32 on a device",
        "sub-batches: k = 2 (2 replicas x 1)",
        "optimizer SGD",
        "memory estimate for a device",
        "steps to go: 8 of 8, about",
    ):
        assert said in result.stdout
    summary, evaluation = (
        json.loads((model_dir / f"{name}.json").read_text()) for name in ("summary", "evaluation")
    )
    assert (summary["experiment"], summary["mode"]) == ("large_batch_dlrm", "train_and_eval")
    assert summary["optimizer"] == "sgd"
    assert (summary["steps"], summary["replicas"], summary["sub_batches"]) == (8, 2, 1)
    assert summary["global_batch_size"] == 64
    assert 0 < summary["step_ms"] < 1000 * summary["seconds"]
    assert {"auc", "log_loss", "accuracy"} <= set(summary["metrics"])
    assert 0.3 < summary["metrics"]["auc"] < 0.9
    assert summary["train_metrics"]["training_loss"] > 0
    assert (evaluation["mode"], evaluation["steps"]) == ("eval", 8)
    assert evaluation["optimizer"] == "sgd"  # which the checkpoint is of
    assert 0.3 < evaluation["metrics"]["auc"] < 0.9


def test_after_another_recipe_in_the_process(small, monkeypatch, capsys):
    """Which has used the Keras that DLRM can not use."""
    import tensorflow as tf

    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "0")
    assert tf.keras.Model
    assert train.main(["train", *small]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("TF_USE_LEGACY_KERAS: expected 1")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["vr_sgd", "vr_adam", "vr_lamb", "sngm", "clars", "adam", "sgd"])
def test_every_optimizer_trains(small, tmp_path, kind):
    own = "trainer.optimizer_config.embeddings.optimizer.type=" + (
        "adagrad" if kind == "vr_sgd" else "null"
    )
    override = f"--params_override=trainer.optimizer_config.optimizer.type={kind},{own}"
    result = _run(*small, override, "--sub_batches=2")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "model" / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["metrics"]["log_loss"] is not None


@pytest.mark.long
def test_a_bad_row_is_named_when_training_meets_it(small, data, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    rows = (bad / "train-00003-of-00016.tsv").read_text().splitlines()
    rows[7] = rows[7].rpartition("\t")[0] + "\t-1"
    (bad / "train-00003-of-00016.tsv").write_text("\n".join(rows))
    result = _run(*small, f"--params_override=task.train_data.input_path={bad}/train-00003*")
    assert result.returncode == 2
    (error,) = result.stderr.strip().splitlines()
    assert "train-00003-of-00016.tsv, line 8: expected an id from 0 to" in error


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stop_and_go_on(small, tmp_path, number):
    """The same command goes on from the checkpoint, with all of the state."""
    kinds = "trainer.optimizer_config.optimizer.type=vr_sgd,"
    kinds += "trainer.optimizer_config.embeddings.optimizer.type=vr_momentum"
    parts = "--sub_batches=2"
    endless = f"--params_override={kinds},trainer.train_steps=100000"
    code, rest, errors = signal_when(
        _command(*small, "--mode=train", parts, endless), "saved checkpoint", number, _environment()
    )
    if number == signal.SIGTERM:
        assert code == 0, errors
        assert "the same command goes on from here" in rest
    else:
        assert code == -9
    assert not (tmp_path / "model" / "summary.json").exists()

    path, before = last_checkpoint(tmp_path / "model")
    step = int(path.rsplit("-", 1)[1])
    momenta = [v for n, v in before.items() if n.startswith("optimizer/") and np.ndim(v) == 2]
    assert any(np.any(v != 0) for v in momenta)
    done = f"--params_override={kinds},trainer.train_steps={step}"
    result = _run(*small, "--mode=train", parts, done)
    assert result.returncode == 0, result.stderr
    assert f"restored from checkpoint: {path}" in result.stdout
    _, after = last_checkpoint(tmp_path / "model")
    assert_same_state(after, before)
    further = f"--params_override={kinds},trainer.train_steps={step + 2}"
    assert _run(*small, "--mode=train", parts, further).returncode == 0
    summary = json.loads((tmp_path / "model" / "summary.json").read_text())
    assert (summary["mode"], summary["steps"], summary["metrics"]) == ("train", step + 2, {})
    _, later = last_checkpoint(tmp_path / "model")
    assert later["global_step/.ATTRIBUTES/VARIABLE_VALUE"] == step + 2
