"""`Pickle(allow=...)`: what pickles may name, and the known ways around such lists."""

import codecs
import collections
import copyreg
import datetime
import decimal
import enum
import functools
import operator
import os
import pickle
import pickletools
import random
import signal
import struct
import sys
import time
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from functools import partial
from types import GenericAlias, SimpleNamespace

import pytest

from conftest import times
from lmdb_object_store import LoadError
from lmdb_object_store.serializers import Bytes, Pickle, Signed

PLAIN = [
    None,
    *(True, 0, -1, 10**400, 1.5, 2j, "é\ud800", b"b" * 1000, bytearray(b"b"), ...),
    [1, [2, (3,)], {"k": {4, frozenset({5})}}],
    *(range(5), slice(1, None), NotImplemented, int, {"type": str}),
]


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __eq__(self, other):
        return (self.x, self.y) == (other.x, other.y)

    __hash__ = None

    class Inner:
        pass

    @staticmethod
    def static():
        raise AssertionError("was called")


class Slots:
    __slots__ = ("a",)


class Growing:
    @classmethod
    def append(cls, *_):
        called.append("harmful")

    extend = add = update = __setitem__ = append


class Other:
    pass


@dataclass
class User:
    name: str


class Color(enum.Enum):
    RED = 1


called = []


def harmless(*arguments):
    called.append(arguments)
    return arguments


def harmful(*arguments):
    called.append("harmful")
    return arguments


class Single:
    def __reduce__(self):
        return "SINGLE"


SINGLE = Single()
REGISTRY = {"a": 1}
system = harmful
alias_of_eval = eval


@pytest.fixture(autouse=True)
def _nothing_was_called():
    called.clear()
    yield
    assert "harmful" not in called


# What is allowed


@pytest.mark.parametrize("value", PLAIN)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(open_store, value, protocol):
    store = open_store(serializer=Pickle(allow=()), autoflush_on_read=False)
    store[b"k"] = value
    assert store[b"k"] == value
    store.flush()
    assert store[b"k"] == value
    if type(value) is bytes and protocol < 3:
        return  # by _codecs.encode
    if type(value) is bytearray and protocol < 5:
        value = bytearray()
    assert Pickle(protocol, allow=()).loads(pickle.dumps(value, protocol)) == value


NAMED = [
    ([datetime.date], datetime.date(2026, 1, 2)),
    ([datetime], datetime.timedelta(3)),
    (["datetime"], [datetime.datetime(2026, 1, 2), datetime.timedelta(1)]),
    (["datetime.date"], {"day": datetime.date(2026, 1, 2)}),
    ([decimal.Decimal], decimal.Decimal("1.5")),
    ([OrderedDict, "collections.deque"], OrderedDict(a=deque([1], 5))),
    ([collections], defaultdict(int, {"a": Counter("b")})),
    ([Point], [Point(1, "b"), Point(2, Point(3, "b"))]),
    ([User], User("b")),
    ([Color], [Color.RED]),
    ([sys.modules[__name__]], [Point(1, "b"), User("b"), Color.RED]),
    ([Point.Inner], Point.Inner),
    ([harmless], harmless),
    ([operator.itemgetter], operator.itemgetter("b")),
]


@pytest.mark.parametrize(("allow", "value"), NAMED)
@pytest.mark.parametrize("protocol", [4, 5])
def test_what_is_named_comes_back(open_store, allow, value, protocol):
    serializer = Pickle(protocol, allow=allow)
    store = open_store(serializer=serializer)
    store[b"k"] = value
    store[b"copy"] = pickle.loads(pickle.dumps(store))[b"k"]
    found = store[b"copy"]
    if isinstance(value, operator.itemgetter):
        found, value = found({"b": 1}), 1
    assert found == value
    assert open_store()[b"k"] == value or value == 1


def test_allow_may_be_any_iterable_and_is_shown():
    serializer = Pickle(allow=(name for name in ["datetime.date", decimal]))
    assert serializer.allow == ("datetime.date", "decimal")
    assert repr(serializer) == "Pickle(protocol=5, allow=('datetime.date', 'decimal'))"


def local():
    class Local:
        pass

    return Local


@pytest.mark.parametrize(
    ("allow", "error"),
    [
        ("datetime.date", TypeError),
        (datetime, TypeError),
        (Point, TypeError),
        ([5], TypeError),
        ([Point(1, 2)], TypeError),
        ([None], TypeError),
        (5, TypeError),
        ([local()], ValueError),
        ([lambda: None], ValueError),
    ],
)
def test_what_cannot_be_allowed_is_refused_at_once(allow, error):
    with pytest.raises(error):
        Pickle(allow=allow)


# What is refused


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2026, 1, 2),
        [Point(1, 2)],
        {"a": {"b": User("b")}},
        Color.RED,
        len,
        harmless,
        {Point},
        OrderedDict(a=1),
        SINGLE,
        [SINGLE],
        Exception("b"),
        SimpleNamespace(a=1),
    ],
)
def test_a_put_of_what_could_not_be_read_is_refused(open_store, value):
    store = open_store(serializer=Pickle(allow=[Slots]))
    for put in (store.put, store.setdefault, lambda *pair: store.put_many([pair])):
        with pytest.raises(
            pickle.PicklingError, match=r"is not allowed.*allow=\["
        ) as e:
            put(b"k", value)
        assert e.value.__notes__[-1] == "while pickling the value of 'k'"
    assert len(store) == 0


@pytest.mark.parametrize("value", [getattr, [].append, eval, copyreg.pickle, os.getpid])
def test_no_message_advises_to_allow_what_can_run_any_code(open_store, value):
    told = "is not allowed: it could let the value run any code"
    with pytest.raises(pickle.PicklingError, match=told):
        open_store(serializer=Pickle(allow=()))[b"k"] = value
    raw = Pickle().dumps(value)
    with pytest.raises(pickle.UnpicklingError, match=told):
        Pickle(allow=()).loads(raw)


def test_what_cannot_be_pickled_at_all_says_so(open_store):
    store = open_store(serializer=Pickle(allow=()))
    for value in (lambda: None, local(), local()()):
        with pytest.raises(
            (pickle.PicklingError, AttributeError), match="local object"
        ):
            store[b"k"] = value


def test_the_error_names_key_class_and_remedy(open_store):
    open_store()[b"k"] = datetime.date(2026, 1, 2)
    store = open_store(serializer=Pickle(allow=[Point]))
    with pytest.raises(
        LoadError,
        match=r"Failed to unpickle buffered key 'k': 'datetime.date' is not allowed. "
        r"If that can do no harm, .* add 'datetime.date' to the list allow=\[...\]",
    ) as caught:
        store[b"k"]
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)


# Attacks. `short` and `text` write the opcodes that the pickler would not.


def short(text):
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def named(module, name):
    return short(module) + short(name) + pickle.STACK_GLOBAL


def called_with(function, *arguments):
    packed = b"".join(arguments)
    return function + pickle.MARK + packed + pickle.TUPLE + pickle.REDUCE


def whole(*opcodes):
    return pickle.PROTO + b"\x05" + b"".join(opcodes) + pickle.STOP


class Reduces:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


HERE = __name__
SHELL = [short("true")]
SYSTEM = operator.methodcaller("system", "true")
ATTACKS = {
    "os.system": whole(called_with(named("os", "system"), *SHELL)),
    "posix.system": whole(called_with(named("posix", "system"), *SHELL)),
    "eval": whole(called_with(named("builtins", "eval"), short(f"{HERE}.harmful()"))),
    "exec": pickle.dumps(Reduces(exec, (f"import {HERE} as m; m.harmful()",))),
    "getattr": pickle.dumps(Reduces(getattr, (datetime.date, "today"))),
    "__import__": pickle.dumps(Reduces(__import__, ("this",))),
    "open": pickle.dumps(Reduces(open, ("/dev/null", "w"))),
    "type": whole(called_with(named("builtins", "type"), pickle.NONE)),
    "object": whole(named("builtins", "object")),
    "by GLOBAL": b"cos\nsystem\n(S'true'\ntR.",
    "by INST": b"(S'true'\nios\nsystem\n.",
    "by OBJ": b"(cos\nsystem\nS'true'\no.",
    "by protocol 2": pickle.dumps(Reduces(eval, (f"{HERE}.harmful()",)), 2),
    "__builtin__": b"c__builtin__\neval\n(S'1'\ntR.",
    "a function of this module": pickle.dumps(Reduces(harmful, ())),
    "a name with dots": whole(named(HERE, "Point.static"), b")R"),
    "a module behind a name": whole(called_with(named(HERE, "codecs.open"), *SHELL)),
    "an import of the module": whole(called_with(named(HERE, "system"), *SHELL)),
    "eval by another name": whole(
        called_with(named(HERE, "alias_of_eval"), short("1"))
    ),
    "dots that mean nothing": whole(named("builtins", "int.__subclasses__")),
    "dots in the module": whole(named("builtins.int", "from_bytes")),
    "an empty module": whole(named("", "builtins.eval")),
    "globals of a function": whole(named(HERE, "harmless.__globals__")),
    "the class of a class": whole(named("builtins", "int.__class__")),
    "copyreg.__reduce_ex__": whole(named("copyreg", "__reduce_ex__")),
    "copyreg._reconstructor": pickle.dumps(Other(), 0),
    "copyreg.__newobj__": whole(named("copyreg", "__newobj__")),
    "copyreg.add_extension": pickle.dumps(
        Reduces(copyreg.add_extension, ("os", "system", 240))
    ),
    "copyreg.pickle": whole(named("copyreg", "pickle")),
    "codecs": pickle.dumps(Reduces(codecs.encode, ("true", "rot13"))),
    "_codecs.encode": pickle.dumps(b"\xff", 2),
    "operator.attrgetter": pickle.dumps(operator.attrgetter("__globals__")),
    "a chain": pickle.dumps(Reduces(SYSTEM, (Reduces(__import__, ("os",)),))),
    "functools.partial": pickle.dumps(partial(harmful)),
    "an unpickler": pickle.dumps(Reduces(pickle.loads, (b"cos\nsystem\n.",))),
    "a persistent id": whole(short("x"), pickle.BINPERSID),
    "a persistent id as text": b"Pos.system\n.",
    "an extension that is not registered": whole(pickle.EXT1, b"\xf0"),
    "a buffer": whole(pickle.NEXT_BUFFER),
    "a name that is no text": whole(pickle.NONE, pickle.NONE, pickle.STACK_GLOBAL),
    "a call of what is no callable": whole(called_with(short("os.system"), *SHELL)),
    "a method of an allowed class": whole(
        named(HERE, "Point.__init__"), pickle.EMPTY_TUPLE, pickle.REDUCE
    ),
    "a dict of the module": whole(
        named(HERE, "REGISTRY"), short("a"), pickle.NONE, pickle.SETITEM
    ),
    "stack underflow": b"\x80\x05R.",
    "nothing": b"",
}
LISTS = {
    "plain data": (),
    "a class": [Point, "test_allow.Slots"],
    "modules": ["test_allow", datetime, Point],
}


@pytest.mark.parametrize("allow", LISTS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused(open_store, attack, allow):
    store = open_store(serializer=Pickle(allow=LISTS[allow]))
    raw = open_store(serializer=Bytes())
    for padding in (b"", b"b"):  # a byte that looks like the opcode BUILD
        raw[b"k"] = ATTACKS[attack] + padding
        for read in (store.get, lambda key: store.get_many([key])):
            with pytest.raises(LoadError, match="Failed to unpickle"):
                read(b"k")
    assert REGISTRY == {"a": 1}


def test_nothing_is_imported_that_is_not_allowed(open_store):
    assert "this" not in sys.modules
    for module, name in (("this", "s"), ("this.that", "s"), ("antigravity", "x")):
        raw = whole(named(module, name))
        for allow in LISTS.values():
            with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
                Pickle(allow=allow).loads(raw)
    assert not {"this", "antigravity"} & set(sys.modules)


STATES = {
    "attributes": pickle.EMPTY_DICT + short("x") + pickle.NONE + pickle.SETITEM,
    "slots": pickle.NONE
    + pickle.EMPTY_DICT
    + short("x")
    + pickle.NONE
    + pickle.SETITEM
    + pickle.TUPLE2,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "target", ["Point", "Slots", "harmless", "Color", "User", "Point.Inner"]
)
def test_a_pickle_cannot_change_what_it_names(target, state):
    allow = [Point, Slots, harmless, Color, User, Point.Inner]
    found = operator.attrgetter(target)(sys.modules[__name__])
    before = dict(vars(found))
    raw = whole(named(HERE, target), STATES[state], pickle.BUILD)
    lists = [allow, [f"{HERE}.{target}"], *([[HERE]] * (target != "harmless"))]
    for allowed in lists:
        with pytest.raises(pickle.UnpicklingError, match="would change"):
            Pickle(allow=allowed).loads(raw)
    assert dict(vars(found)) == before
    if state == "slots":  # the attack works where nothing is in its way
        pickle.loads(raw)
        assert vars(found) != before
        del found.x


def test_plain_types_cannot_be_changed():
    for name in ("int", "dict", "set", "bytearray"):
        for state in STATES.values():
            raw = whole(named("builtins", name), state, pickle.BUILD)
            with pytest.raises((TypeError, AttributeError, pickle.UnpicklingError)):
                Pickle(allow=()).loads(raw)


@pytest.fixture
def extension():
    copyreg.add_extension(HERE, "Other", 240)
    copyreg.add_extension(HERE, "Point", 241)
    yield
    copyreg.remove_extension(HERE, "Other", 240)
    copyreg.remove_extension(HERE, "Point", 241)


@pytest.mark.usefixtures("extension")
def test_codes_of_copyreg_are_looked_up_in_the_list(open_store):
    by_code = pickle.dumps([Other(), Point(1, 2)], 2)
    assert b"Other" not in by_code
    assert pickle.loads(by_code)  # from now on, pickle finds the class in a cache
    for allow in ((), [Point], ["datetime"]):
        with pytest.raises(pickle.UnpicklingError, match=r"Other' is not allowed"):
            Pickle(allow=allow).loads(by_code)
    assert Pickle(allow=[Other, Point]).loads(by_code)[1] == Point(1, 2)
    with pytest.raises(pickle.UnpicklingError, match="no extension code 77"):
        Pickle(allow=()).loads(whole(pickle.EXT1, b"\x4d"))
    store = open_store(serializer=Pickle(2, allow=[Point]))
    store[b"k"] = Point(3, 4)
    assert store[b"k"] == Point(3, 4)
    with pytest.raises(pickle.PicklingError, match="Other' is not allowed"):
        store[b"k"] = Other()


def test_a_module_stands_for_the_classes_that_it_defines():
    serializer = Pickle(allow=[sys.modules[__name__]])
    others = ["system", "alias_of_eval", "codecs", "REGISTRY", "called", "nothing"]
    others += ["harmless", "Point.static", "Point.__init__", "Counter", "codecs.open"]
    for name in others:
        with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
            serializer.loads(whole(named(HERE, name)))
    for name in ("Point", "Point.Inner", "Color"):
        assert serializer.loads(whole(named(HERE, name)))
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        serializer.loads(whole(named(f"{HERE}.sub", "x")))


@pytest.mark.parametrize("target", ["Growing", "harmless", "Color"])
def test_an_alias_changes_nothing_of_the_class_behind(target):
    attribute = pickle.EMPTY_DICT + short("x") + pickle.NONE + pickle.SETITEM
    alias = called_with(
        named("types", "GenericAlias"), named(HERE, target), named("builtins", "int")
    )
    allow = [GenericAlias, Growing, harmless, Color]
    for change in (attribute + pickle.BUILD, pickle.NONE + pickle.APPEND):
        with pytest.raises(pickle.UnpicklingError, match="would change"):
            Pickle(allow=allow).loads(whole(alias, change))
    serializer = Pickle(allow=[GenericAlias])
    assert serializer.loads(serializer.dumps(list[int])) == list[int]


def test_a_pickle_that_names_much_takes_no_longer_than_others():
    raw = whole((named(HERE, "Point") + b"0") * 20_000, b"]", b"Na" * 20_000)
    started = time.process_time()
    Pickle(allow=[Point]).loads(raw)
    once = time.process_time() - started
    started = time.process_time()
    Pickle(allow=[Point]).loads(whole(named(HERE, "Point"), b"0]", b"Na" * 20_000))
    assert once < 50 * (time.process_time() - started)


@pytest.mark.parametrize("name", ["test_allow.nothing", "no_such_module.x", "User"])
def test_a_name_that_leads_nowhere(name):
    serializer = Pickle(allow=[name, "builtins.NoneType"])
    module, _, rest = name.rpartition(".")
    for raw in (whole(named(module, rest)), whole(named("builtins", "NoneType"))):
        with pytest.raises(pickle.UnpicklingError, match=r"there is no|is not allowed"):
            serializer.loads(raw)
    with pytest.raises(pickle.PicklingError, match="NoneType' is not allowed"):
        serializer.dumps(type(None))


@pytest.mark.parametrize("protocol", [2, 5])
def test_names_are_those_of_today(protocol):
    serializer = Pickle(protocol, allow=[FileNotFoundError, functools.reduce])
    for value in (FileNotFoundError(2, "no", "file"), functools.reduce):
        assert repr(serializer.loads(serializer.dumps(value))) == repr(value)


def test_members_of_an_enum_that_are_pickled_by_name():
    allow = ["signal.SIGINT", "signal.Signals"]  # Python 3.10 names the former
    serializer = Pickle(allow=allow)
    assert serializer.loads(serializer.dumps([signal.SIGINT])) == [signal.SIGINT]


def test_members_of_an_enum_cannot_be_changed():
    state = pickle.EMPTY_DICT + short("_value_") + pickle.BININT1 + b"\x02"
    member = called_with(named(HERE, "Color"), pickle.BININT1 + b"\x01")
    raw = whole(member, state + pickle.SETITEM, pickle.BUILD)
    for allowed in ([Color], [HERE]):
        with pytest.raises(pickle.UnpicklingError, match="would change"):
            Pickle(allow=allowed).loads(raw)
    assert Color.RED.value == 1


@pytest.mark.parametrize("allow", [[Growing], ["test_allow.Growing"], [HERE]])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("opcode", ["APPEND", "SETITEM", "ADDITEM"])
def test_opcodes_that_fill_containers_call_nothing_of_a_class(opcode, many, allow):
    code = getattr(pickle, opcode + "S" * (many or opcode == "ADDITEM"))
    arguments = short("x") * (1 + (opcode == "SETITEM"))
    mark = pickle.MARK if len(code) and code != getattr(pickle, opcode, None) else b""
    raw = whole(named(HERE, "Growing"), mark, arguments, code)
    for padding in (b"", b"b"):
        with pytest.raises(pickle.UnpicklingError, match="would change"):
            Pickle(allow=allow).loads(raw + padding)


def test_a_class_method_is_called_as_often_as_one_likes():
    # In CPython 3.13.0, list.append called by this crashed the process.
    raw = b"\x80\x05]" + b"Na" * 5000 + b"0" + named("builtins", "list") + b"Na."
    for allow in ((), [Point]):
        with pytest.raises((pickle.UnpicklingError, TypeError)):
            Pickle(allow=allow).loads(raw)


def test_a_module_of_today_with_a_name_of_python_2(tmp_path, monkeypatch):
    (tmp_path / "commands.py").write_text("class Command: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "commands", raising=False)
    commands = __import__("commands")
    for allow in ([commands], [commands.Command], ["commands.Command"]):
        serializer = Pickle(allow=allow)
        raw = serializer.dumps(commands.Command())
        assert type(serializer.loads(raw)) is commands.Command


def test_text_is_no_reason_for_the_slow_way(monkeypatch):
    value = [{"id": n, "tags": ["a", "b"]} for n in range(1000)]
    raw = pickle.dumps(value, 5)

    def slow(*_):
        raise AssertionError("was used")

    serializer = Pickle(allow=[Point, "datetime"])
    monkeypatch.setattr("pickle._Unpickler.load", slow)
    assert serializer.loads(raw) == value
    with pytest.raises(AssertionError, match="was used"):
        serializer.loads(serializer.dumps(Point(1, 2)))


class Refuses(Pickle):
    def loads(self, raw):
        raise ValueError("refused")


def test_a_subclass_is_called(open_store):
    store = open_store(serializer=Refuses())
    store[b"k"] = 1
    with pytest.raises(LoadError, match="refused"):
        store[b"k"]
    assert type(pickle.loads(pickle.dumps(Refuses()))) is Refuses


def test_only_classes_and_functions_can_be_named():
    serializer = Pickle(allow=[f"{HERE}.REGISTRY", f"{HERE}.harmless"])
    with pytest.raises(pickle.UnpicklingError, match="no class and no function"):
        serializer.loads(whole(named(HERE, "REGISTRY")))
    assert serializer.loads(whole(named(HERE, "harmless"))) is harmless


def test_a_long_name_is_shortened_in_the_message():
    name = pickle.BINUNICODE + struct.pack("<I", 10**6) + b"x" * 10**6
    with pytest.raises(pickle.UnpicklingError) as caught:
        Pickle(allow=()).loads(whole(short("m"), name, pickle.STACK_GLOBAL))
    assert len(str(caught.value)) < 1000


SIZED = {"LONG_BINPUT", "LONG1", "LONG4", "BYTEARRAY8", "LONG_BINGET", "PUT", "FRAME"}
"""Opcodes by which a few bytes can ask for gigabytes, which `allow` doesn't prevent."""


def is_modest(raw):
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in SIZED and not -(10**6) < int(argument or 0) < 10**6:
                return False
    except Exception:
        return b"r" not in raw
    return True


def test_random_opcodes_call_nothing():
    rng = random.Random(5)
    opcodes = [bytes([code]) for code in range(256)]
    calls = [b")R", b"b", b"(N", b"t", b"R", b"\x81", pickle.EMPTY_DICT]
    harm = named(HERE, "harmful")
    pieces = [*opcodes, *[*ATTACKS.values(), harm, *SHELL, *calls] * 3]
    lists = [(), [Point, "test_allow.Slots"], [datetime, Point, "test_allow.User"]]
    serializers = [Pickle(allow=allow) for allow in lists]
    tried = 0
    for _ in range(times(4000, thorough=100_000)):
        raw = b"\x80\x05" + b"".join(rng.choices(pieces, k=rng.randrange(1, 12))) + b"."
        if not is_modest(raw):
            continue
        tried += harm in raw
        for serializer in serializers:
            try:
                serializer.loads(raw)
            except Exception:
                continue
    assert tried > 20
    assert REGISTRY == {"a": 1}


def test_large_values_are_read_in_each_way(open_store):
    store = open_store(serializer=Pickle(allow=[Point]))
    value = [Point(1, "b" * 300_000), bytes(300_000)]
    store.put_many({b"a": value, b"k": value})
    for _ in range(2):
        assert store[b"k"] == store.get_many([b"k"])[0][b"k"] == value
        assert dict(store.items()) == {b"a": value, b"k": value}
    with store.snapshot() as snapshot:
        assert snapshot[b"k"] == value
    nested = open_store("nested", serializer=Signed(Pickle(allow=[Point]), b"s" * 32))
    nested[b"k"] = value
    nested.flush()
    assert nested[b"k"] == value
