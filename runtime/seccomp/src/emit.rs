//! Emitting classic BPF.
//!
//! The program is built from its end to its beginning: BPF jumps only forward, so every target exists
//! when the jump to it is made. A conditional jump reaches 255 instructions; what is further away is
//! reached through a `ja` (32-bit reach) or, when it is a `ret`, through a copy of it.

use crate::{
    Instruction,
    rules::{Condition, Decision, Rule},
};
use oci_spec::runtime::LinuxSeccompOperator as Op;
use std::collections::HashMap;

const LD_ABS: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const RET: u16 = 0x06; // BPF_RET | BPF_K
const JA: u16 = 0x05; // BPF_JMP | BPF_JA
pub(crate) const JEQ: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const JSET: u16 = 0x45;

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

const REACH: usize = u8::MAX as usize;

/// A place in the program: its distance from the end.
pub(crate) type Label = usize;

/// What a range of system call numbers gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Decision(Decision),
    /// Code that is there already and wants the number in the accumulator.
    Code(Label),
}

/// A program under construction, last instruction first.
#[derive(Default)]
pub(crate) struct Emitter {
    reversed: Vec<Instruction>,
    returns: HashMap<u32, Label>,
}

impl Emitter {
    /// Puts a finished piece of program before what is there, unchanged.
    pub fn prepend(&mut self, piece: impl DoubleEndedIterator<Item = Instruction>) -> Label {
        self.reversed.extend(piece.rev());
        self.reversed.len() - 1
    }

    /// The finished program.
    pub fn finish(mut self) -> Vec<Instruction> {
        self.reversed.reverse();
        self.reversed
    }

    fn push(&mut self, code: u16, k: u32) -> Label {
        self.reversed.push(Instruction {
            code,
            jt: 0,
            jf: 0,
            k,
        });
        self.reversed.len() - 1
    }

    /// How many instructions one placed `ahead` from now must skip to get to `to`.
    fn distance(&self, to: Label, ahead: usize) -> usize {
        self.reversed.len() + ahead - to - 1
    }

    /// A place that leads to `to` and that a conditional jump reaches, even after `ahead` more instructions.
    fn near(&mut self, to: Label, ahead: usize) -> Label {
        if self.distance(to, ahead) <= REACH {
            to
        } else {
            self.relay(to)
        }
    }

    fn relay(&mut self, to: Label) -> Label {
        let target = self.reversed[to];
        if target.code == RET {
            let label = self.push(RET, target.k);
            self.returns.insert(target.k, label);
            label
        } else {
            let skip = self.distance(to, 0);
            self.push(JA, skip as u32)
        }
    }

    /// `ret value`; one copy serves all that can reach it.
    pub fn ret(&mut self, value: u32) -> Label {
        match self.returns.get(&value) {
            // Leave room: what jumps here comes later, with its own relays in between.
            Some(&label) if self.distance(label, 0) <= REACH / 2 => label,
            _ => {
                let label = self.push(RET, value);
                self.returns.insert(value, label);
                label
            }
        }
    }

    /// `if A <op> k goto yes else goto no`.
    pub fn branch(&mut self, op: u16, k: u32, yes: Label, no: Label) -> Label {
        let yes = self.near(yes, 1);
        let no = self.near(no, 0);
        let (jt, jf) = (self.distance(yes, 0) as u8, self.distance(no, 0) as u8);
        self.reversed.push(Instruction {
            code: op,
            jt,
            jf,
            k,
        });
        self.reversed.len() - 1
    }

    /// An instruction that is followed by `next`.
    fn then(&mut self, code: u16, k: u32, next: Label) -> Label {
        if next + 1 != self.reversed.len() {
            self.relay(next);
        }
        self.push(code, k)
    }

    /// Loads the audit architecture.
    pub fn load_arch(&mut self, next: Label) -> Label {
        self.then(LD_ABS, ARCH, next)
    }

    /// Loads the system call number.
    pub fn load_number(&mut self, next: Label) -> Label {
        self.then(LD_ABS, NR, next)
    }

    /// A balanced search tree over `ranges`: (first number, what it and its successors get), ascending.
    /// Wants the number in the accumulator. `wide` says whether a number's arguments have 64 bits.
    pub fn tree(
        &mut self,
        ranges: &[(u32, Target)],
        default: u32,
        wide: &dyn Fn(u32) -> bool,
    ) -> Label {
        self.spans(&spans(ranges), default, wide)
    }

    fn spans(&mut self, spans: &[Span], default: u32, wide: &dyn Fn(u32) -> bool) -> Label {
        match spans {
            [] => self.ret(default),
            [span] => self.span(span, &span.lone, default, wide),
            _ => {
                let mid = middle(spans);
                let upper = self.spans(&spans[mid..], default, wide);
                let lower = self.spans(&spans[..mid], default, wide);
                self.branch(JGE, spans[mid].start, upper, lower)
            }
        }
    }

    /// One span, with those of its lone numbers that may still come.
    fn span(
        &mut self,
        span: &Span,
        lone: &[(u32, &Target)],
        default: u32,
        wide: &dyn Fn(u32) -> bool,
    ) -> Label {
        if lone.len() > CHAIN {
            let mid = lone.len() / 2;
            let upper = self.span(span, &lone[mid..], default, wide);
            let lower = self.span(span, &lone[..mid], default, wide);
            return self.branch(JGE, lone[mid].0, upper, lower);
        }
        let mut next = self.leaf(span.target, default, wide(span.start));
        for (number, target) in lone.iter().rev() {
            let here = self.leaf(target, default, wide(*number));
            next = self.branch(JEQ, *number, here, next);
        }
        next
    }

    fn leaf(&mut self, target: &Target, default: u32, wide: bool) -> Label {
        match target {
            Target::Code(label) => *label,
            Target::Decision(Decision::Always(value)) => self.ret(*value),
            Target::Decision(Decision::Checks(rules)) => self.checks(rules, default, wide),
        }
    }

    /// The first rule that matches, else the default.
    fn checks(&mut self, rules: &[Rule], default: u32, wide: bool) -> Label {
        let Some(first) = rules.first() else {
            return self.ret(default);
        };
        let shared = rules.iter().take_while(|r| alike(r, first)).count();
        if shared > 1 {
            let next = self.checks(&rules[shared..], default, wide);
            return self.alike(&rules[..shared], next, wide);
        }
        let next = self.checks(&rules[1..], default, wide);
        self.rule(first, next, wide)
    }

    /// Rules of one whole comparison each, of one argument with values of one high half: the halves are loaded
    /// once for all of them.
    fn alike(&mut self, rules: &[Rule], next: Label, wide: bool) -> Label {
        let c = &rules[0].conditions[0];
        let mut low = next;
        for rule in rules.iter().rev() {
            let (c, matched) = (&rule.conditions[0], self.ret(rule.ret));
            let (op, yes, no) = match c.op {
                Op::ScmpCmpEq | Op::ScmpCmpMaskedEq => (JEQ, matched, low),
                Op::ScmpCmpNe => (JEQ, low, matched),
                Op::ScmpCmpGt => (JGT, matched, low),
                Op::ScmpCmpGe => (JGE, matched, low),
                Op::ScmpCmpLe => (JGT, low, matched),
                Op::ScmpCmpLt => (JGE, low, matched),
            };
            low = self.branch(op, c.value as u32, yes, no);
        }
        low = self.then(LD_ABS, offset_low(c), low);
        if !wide {
            return low;
        }
        // With another high half it is settled which rule is the first to match.
        let mut settled =
            |matches: &[Op]| match rules.iter().find(|r| matches.contains(&r.conditions[0].op)) {
                Some(rule) => self.ret(rule.ret),
                None => next,
            };
        let above = settled(&[Op::ScmpCmpNe, Op::ScmpCmpGt, Op::ScmpCmpGe]);
        let below = settled(&[Op::ScmpCmpNe, Op::ScmpCmpLt, Op::ScmpCmpLe]);
        let high = (c.value >> 32) as u32;
        let other = if high == 0 || self.same(above, below) {
            above
        } else {
            self.branch(JGT, high, above, below)
        };
        let equal = self.branch(JEQ, high, low, other);
        self.then(LD_ABS, offset_high(c), equal)
    }

    /// Whether two places do the same: they are one, or both return the same value.
    fn same(&self, a: Label, b: Label) -> bool {
        a == b || (self.reversed[a] == self.reversed[b] && self.reversed[a].code == RET)
    }

    /// All conditions of a rule, or on to `next`.
    fn rule(&mut self, rule: &Rule, next: Label, wide: bool) -> Label {
        let mut matched = self.ret(rule.ret);
        for condition in rule.conditions.iter().rev() {
            matched = self.condition(condition, matched, next, wide);
        }
        matched
    }

    fn condition(&mut self, c: &Condition, yes: Label, no: Label, wide: bool) -> Label {
        match c.op {
            Op::ScmpCmpEq => self.masked(c, yes, no, wide),
            Op::ScmpCmpMaskedEq => self.masked(c, yes, no, wide),
            Op::ScmpCmpNe => self.masked(c, no, yes, wide),
            Op::ScmpCmpGt => self.ordered(JGT, c, yes, no, wide),
            Op::ScmpCmpGe => self.ordered(JGE, c, yes, no, wide),
            Op::ScmpCmpLe => self.ordered(JGT, c, no, yes, wide),
            Op::ScmpCmpLt => self.ordered(JGE, c, no, yes, wide),
        }
    }

    /// `(argument & mask) == value`.
    fn masked(&mut self, c: &Condition, yes: Label, no: Label, wide: bool) -> Label {
        let (high, low) = (offset_high(c), offset_low(c));
        let low_half = self.masked_half(low, c.mask as u32, c.value as u32, yes, no);
        if wide {
            self.masked_half(
                high,
                (c.mask >> 32) as u32,
                (c.value >> 32) as u32,
                low_half,
                no,
            )
        } else {
            low_half
        }
    }

    fn masked_half(&mut self, offset: u32, mask: u32, value: u32, yes: Label, no: Label) -> Label {
        match (mask, value) {
            (0, _) => yes,
            (u32::MAX, _) => {
                let test = self.branch(JEQ, value, yes, no);
                self.then(LD_ABS, offset, test)
            }
            (_, 0) => {
                let test = self.branch(JSET, mask, no, yes);
                self.then(LD_ABS, offset, test)
            }
            _ => {
                let test = self.branch(JEQ, value, yes, no);
                let and = self.then(AND, mask, test);
                self.then(LD_ABS, offset, and)
            }
        }
    }

    /// `argument > value` or `argument >= value`, unsigned.
    fn ordered(&mut self, op: u16, c: &Condition, yes: Label, no: Label, wide: bool) -> Label {
        let test = self.branch(op, c.value as u32, yes, no);
        let low = self.then(LD_ABS, offset_low(c), test);
        if !wide {
            return low;
        }
        let high = (c.value >> 32) as u32;
        let equal = self.branch(JEQ, high, low, no);
        let greater = self.branch(JGT, high, yes, equal);
        self.then(LD_ABS, offset_high(c), greater)
    }
}

/// Ranges of equal target, but for lone numbers in between, for which one test is enough where a range of
/// their own would take two.
struct Span<'a> {
    start: u32,
    target: &'a Target,
    lone: Vec<(u32, &'a Target)>,
}

/// More lone numbers than this in a row are searched, fewer are tried one by one.
const CHAIN: usize = 3;

fn spans(ranges: &[(u32, Target)]) -> Vec<Span<'_>> {
    let mut spans: Vec<Span<'_>> = Vec::with_capacity(ranges.len());
    let mut rest = ranges;
    while let [(start, target), after @ ..] = rest {
        rest = after;
        if let (Some(span), [(next, beyond), further @ ..]) = (spans.last_mut(), after)
            && span.target == beyond
            && *next == start + 1
        {
            span.lone.push((*start, target));
            rest = further;
        } else {
            spans.push(Span {
                start: *start,
                target,
                lone: Vec::new(),
            });
        }
    }
    spans
}

/// Where to cut so that both halves have about as many tests to make.
fn middle(spans: &[Span<'_>]) -> usize {
    let weight = |s: &[Span<'_>]| s.len() - 1 + s.iter().map(|s| s.lone.len()).sum::<usize>();
    (1..spans.len())
        .min_by_key(|i| weight(&spans[..*i]).abs_diff(weight(&spans[*i..])))
        .unwrap_or(1)
}

/// Whether both rules are one unmasked comparison of one argument, with values of one high half.
fn alike(a: &Rule, b: &Rule) -> bool {
    match (a.conditions.as_slice(), b.conditions.as_slice()) {
        ([x], [y]) => {
            x.arg == y.arg
                && x.value >> 32 == y.value >> 32
                && x.mask == u64::MAX
                && y.mask == u64::MAX
        }
        _ => false,
    }
}

/// The supported machines are little endian: the low half comes first.
fn offset_low(c: &Condition) -> u32 {
    ARGS + 8 * u32::from(c.arg)
}

fn offset_high(c: &Condition) -> u32 {
    offset_low(c) + 4
}
