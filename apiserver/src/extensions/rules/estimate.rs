//! What a rule can cost at worst, from the bounds that the schema sets: a definition whose rules could cost too much is
//! not accepted. The model is upstream's, to the unit: a definition is accepted here exactly where it is there.

use std::collections::HashMap;

use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue, operators};

use super::declared::{Declared, Shape};

/// The most that one rule can be let cost.
pub const PER_RULE: u64 = 10_000_000;
/// The most that all rules of a schema can be let cost together.
pub const PER_SCHEMA: u64 = 100_000_000;

const UNKNOWN: u64 = u64::MAX;
const AUTHORIZATION: u64 = 350_000;

/// The worst cost of an expression that sees `self` and `oldSelf` as they are declared.
pub fn worst_cost(tree: &IdedExpr, declared: &Declared) -> u64 {
    let own = || Guess { declared: Some(declared), ..Guess::of(declared) };
    let names = HashMap::from([("self".to_owned(), own()), ("oldSelf".to_owned(), own())]);
    Estimator { names }.estimate(tree).cost
}

/// What is known of the value of a part of an expression, and what it costs to have it.
#[derive(Clone, Copy)]
struct Guess<'d> {
    cost: u64,
    /// The most letters, items or members.
    size: u64,
    kind: Kind,
    declared: Option<&'d Declared>,
    /// Of a list or map without a declaration.
    item_size: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Unknown,
    Scalar,
    Text,
    List,
    Map,
}

impl<'d> Guess<'d> {
    fn unknown() -> Self {
        Self { cost: 0, size: UNKNOWN, kind: Kind::Unknown, declared: None, item_size: UNKNOWN }
    }

    fn scalar() -> Self {
        Self { size: 1, kind: Kind::Scalar, ..Self::unknown() }
    }

    fn sized(kind: Kind, size: u64) -> Self {
        Self { size, kind, ..Self::unknown() }
    }

    fn of(declared: &'d Declared) -> Self {
        let kind = match &declared.shape {
            Shape::IntOrText => Kind::Unknown,
            Shape::Bool | Shape::Int | Shape::Double | Shape::Duration | Shape::Date | Shape::DateTime => Kind::Scalar,
            Shape::Text | Shape::Bytes => Kind::Text,
            Shape::List { .. } => Kind::List,
            Shape::Map(_) | Shape::Object(_) => Kind::Map,
        };
        Self { declared: Some(declared), ..Self::sized(kind, declared.most) }
    }

    fn costing(self, cost: u64) -> Self {
        Self { cost, ..self }
    }

    /// An item of a list, a value of a map.
    fn item(&self) -> Self {
        match self.declared.map(|declared| &declared.shape) {
            Some(Shape::List { item, .. }) => Self::of(item),
            Some(Shape::Map(value)) => Self::of(value),
            _ => Self { size: self.item_size, ..Self::unknown() },
        }
    }

    /// What a loop over it sees.
    fn turn(&self) -> Self {
        match self.kind {
            // How long keys are is not declared, and not counted.
            Kind::Map => Self::sized(Kind::Text, if self.declared.is_some() { 0 } else { UNKNOWN }),
            _ => self.item(),
        }
    }

    fn field(&self, name: &str) -> Self {
        match self.declared.map(|declared| (&declared.shape, declared.field(name))) {
            Some((Shape::Object(_), Some(field))) => Self::of(field),
            // Upstream knows the sizes of a map's values only where they are looked up by an index.
            Some((Shape::Map(value), _)) => match Self::of(value).kind {
                Kind::Scalar => Self::scalar(),
                kind => Self::sized(kind, UNKNOWN),
            },
            _ => Self::unknown(),
        }
    }
}

/// A tenth of the size, rounded up: what looking at the letters costs.
fn letters(size: u64) -> u64 {
    size.div_ceil(10)
}

/// A quarter of the size, rounded up: what a pattern costs for each letter that it looks at.
fn pattern(size: u64) -> u64 {
    size.div_ceil(4)
}

struct Estimator<'d> {
    names: HashMap<String, Guess<'d>>,
}

impl<'d> Estimator<'d> {
    fn estimate(&mut self, tree: &IdedExpr) -> Guess<'d> {
        match &tree.expr {
            Expr::Unspecified => Guess::scalar(),
            Expr::Literal(literal) => match literal {
                LiteralValue::String(text) => Guess::sized(Kind::Text, text.inner().chars().count() as u64),
                LiteralValue::Bytes(bytes) => Guess::sized(Kind::Text, bytes.inner().len() as u64),
                _ => Guess::scalar(),
            },
            Expr::Ident(name) => self.names.get(name).copied().unwrap_or_else(Guess::unknown).costing(1),
            Expr::Select(select) => {
                let operand = self.estimate(&select.operand);
                match select.test {
                    true => Guess::scalar().costing(operand.cost),
                    false => operand.field(&select.field).costing(operand.cost.saturating_add(1)),
                }
            }
            Expr::List(list) => {
                let items: Vec<Guess<'d>> = list.elements.iter().map(|item| self.estimate(item)).collect();
                let cost = items.iter().fold(10_u64, |sum, item| sum.saturating_add(item.cost));
                let item_size = items.iter().map(|item| item.size).max().unwrap_or(0);
                Guess { cost, item_size, ..Guess::sized(Kind::List, items.len() as u64) }
            }
            Expr::Map(map) => {
                let entries: Vec<Guess<'d>> = map.entries.iter().map(|entry| self.entry(&entry.expr)).collect();
                let cost = entries.iter().fold(30_u64, |sum, entry| sum.saturating_add(entry.cost));
                let item_size = entries.iter().map(|entry| entry.size).max().unwrap_or(0);
                Guess { cost, item_size, ..Guess::sized(Kind::Map, entries.len() as u64) }
            }
            Expr::Struct(literal) => {
                let entries = literal.entries.iter().map(|entry| self.entry(&entry.expr).cost);
                let cost = entries.fold(40_u64, u64::saturating_add);
                Guess::unknown().costing(cost)
            }
            Expr::Call(call) => self.call(call),
            Expr::Comprehension(comprehension) => self.comprehension(comprehension),
        }
    }

    fn entry(&mut self, entry: &EntryExpr) -> Guess<'d> {
        match entry {
            EntryExpr::StructField(field) => self.estimate(&field.value),
            EntryExpr::MapEntry(entry) => {
                let key = self.estimate(&entry.key);
                let value = self.estimate(&entry.value);
                value.costing(key.cost.saturating_add(value.cost))
            }
        }
    }

    fn comprehension(&mut self, c: &ComprehensionExpr) -> Guess<'d> {
        let range = self.estimate(&c.iter_range);
        let start = self.estimate(&c.accu_init);
        let outer = self.names.clone();
        self.names.insert(c.accu_var.clone(), Guess { cost: 0, ..start });
        let once = range.cost.saturating_add(start.cost);
        if is_bind(c) {
            let result = self.estimate(&c.result);
            self.names = outer;
            return result.costing(once.saturating_add(result.cost));
        }
        self.names.insert(c.iter_var.clone(), range.turn());
        if let Some(second) = &c.iter_var2 {
            self.names.insert(second.clone(), range.item());
        }
        let condition = self.estimate(&c.loop_cond);
        let step = self.estimate(&c.loop_step);
        let result = self.estimate(&c.result);
        self.names = outer;
        let turns = range.size.saturating_mul(condition.cost.saturating_add(step.cost));
        let cost = once.saturating_add(turns).saturating_add(result.cost);
        match start.kind {
            Kind::List | Kind::Map => {
                Guess { size: range.size, item_size: step.item_size, declared: None, cost, ..start }
            }
            _ => Guess { cost, ..start },
        }
    }

    fn call(&mut self, call: &CallExpr) -> Guess<'d> {
        if let Some(qualified) = qualified(call) {
            let arguments: Vec<Guess<'d>> = call.args.iter().map(|argument| self.estimate(argument)).collect();
            return total(function(&qualified, None, &arguments), None, &arguments);
        }
        let arguments: Vec<Guess<'d>> = call.args.iter().map(|argument| self.estimate(argument)).collect();
        let target = call.target.as_deref().map(|target| self.estimate(target));
        match (call.func_name.as_str(), arguments.as_slice()) {
            (operators::LOGICAL_AND | operators::LOGICAL_OR, _) => total(Guess::scalar(), None, &arguments),
            (operators::CONDITIONAL, [condition, yes, no]) => {
                let cost = condition.cost.saturating_add(yes.cost.max(no.cost));
                let kind = if yes.kind == no.kind { yes.kind } else { Kind::Unknown };
                let item_size = yes.item_size.max(no.item_size);
                Guess { cost, item_size, ..Guess::sized(kind, yes.size.max(no.size)) }
            }
            // A negative number is a literal.
            (operators::NEGATE, [number]) if number.cost == 0 => *number,
            (operators::INDEX, [operand, _]) => total(operand.item().costing(1), None, &arguments),
            (name, _) => total(function(name, target.as_ref(), &arguments), target, &arguments),
        }
    }
}

/// The call's own cost with those of what it is called with.
fn total<'d>(own: Guess<'d>, target: Option<Guess<'d>>, arguments: &[Guess<'d>]) -> Guess<'d> {
    let operands = target.iter().chain(arguments);
    own.costing(operands.fold(own.cost, |sum, operand| sum.saturating_add(operand.cost)))
}

/// `sortBy` becomes a loop without turns, that only gives a value a name.
fn is_bind(c: &ComprehensionExpr) -> bool {
    matches!(&c.iter_range.expr, Expr::List(list) if list.elements.is_empty())
        && matches!(&c.loop_cond.expr, Expr::Literal(LiteralValue::Boolean(never)) if !*never.inner())
}

/// The whole name of a library's function, which the tree takes for one of a value.
fn qualified(call: &CallExpr) -> Option<String> {
    match &call.target.as_deref()?.expr {
        Expr::Ident(name) if crate::cel::check::NAMES.contains(&name.as_str()) => {
            Some(format!("{name}.{}", call.func_name))
        }
        _ => None,
    }
}

/// What a function costs by itself, and what its result is.
fn function<'d>(name: &str, target: Option<&Guess<'d>>, arguments: &[Guess<'d>]) -> Guess<'d> {
    let size = |index: usize| arguments.get(index).map_or(0, |argument| argument.size);
    let own = target.map_or_else(|| size(0), |target| target.size);
    let text = |size| Guess::sized(Kind::Text, size);
    match name {
        "check" => Guess::unknown().costing(AUTHORIZATION),
        operators::EQUALS | operators::NOT_EQUALS => Guess::scalar().costing(letters(size(0).min(size(1)))),
        operators::LESS | operators::LESS_EQUALS | operators::GREATER | operators::GREATER_EQUALS => {
            let is_scalar = arguments.iter().any(|argument| argument.kind == Kind::Scalar);
            Guess::scalar().costing(if is_scalar { 1 } else { letters(size(0).min(size(1))).max(1) })
        }
        operators::ADD => add(arguments),
        operators::IN => {
            let is_map = arguments.get(1).is_some_and(|container| container.kind == Kind::Map);
            Guess::scalar().costing(if is_map { 1 } else { size(1).max(1) })
        }
        "startsWith" | "endsWith" => Guess::scalar().costing(letters(size(0))),
        "contains" => Guess::scalar().costing(letters(own).saturating_mul(letters(size(0)))),
        "matches" => {
            let (subject, regex) = target.map_or_else(|| (size(0), size(1)), |target| (target.size, size(0)));
            Guess::scalar().costing(letters(subject.saturating_add(1)).saturating_mul(pattern(regex)))
        }
        "find" | "findAll" => {
            let kind = if name == "find" { Kind::Text } else { Kind::List };
            let cost = letters(own.saturating_add(1)).saturating_mul(pattern(size(0)));
            Guess::sized(kind, own).costing(cost)
        }
        "isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf" | "includes" => over_items(name, target, own),
        "url" | "jsonpatch.escapeKey" => text(size(0)).costing(letters(size(0))),
        "lowerAscii" | "upperAscii" | "substring" | "trim" => text(own).costing(letters(own)),
        "replace" => text(replaced(own, size(1))).costing(own.saturating_mul(2).div_ceil(10)),
        "split" => {
            Guess { item_size: own, ..Guess::sized(Kind::List, own) }.costing(own.saturating_mul(2).div_ceil(10))
        }
        "join" => {
            let items = target.map_or(UNKNOWN, |target| target.item().size);
            let separators = size(0).saturating_mul(own.saturating_sub(1));
            let size = own.saturating_mul(items).saturating_add(separators);
            text(size).costing(letters(size))
        }
        "cidr" | "isIP" | "isCIDR" | "quantity" | "isQuantity" | "semver" | "isSemver" => {
            Guess::unknown().costing(letters(size(0)))
        }
        "ip" if target.is_none() => Guess::unknown().costing(letters(size(0))),
        "ip.isCanonical" => Guess::scalar().costing(size(0).saturating_mul(2).div_ceil(10)),
        "containsIP" => Guess::scalar().costing(letters(32).saturating_add(parsed(arguments))),
        "containsCIDR" => Guess::scalar().costing(letters(32) + letters(16) + 1 + parsed(arguments)),
        "validate" => Guess::unknown().costing(letters(size(0)).saturating_mul(32)),
        "bytes" => text(size(0).saturating_mul(4)).costing(letters(size(0))),
        "format" => text(UNKNOWN).costing(letters(own)),
        "strings.quote" => text(size(0).saturating_mul(2).saturating_add(2)).costing(letters(size(0))),
        "string" => match arguments.first() {
            Some(argument) if argument.kind == Kind::Text => text(argument.size).costing(letters(argument.size)),
            // No number or time is longer.
            Some(argument) if argument.kind == Kind::Scalar => text(32).costing(1),
            _ => text(UNKNOWN).costing(1),
        },
        "dyn" => arguments.first().copied().unwrap_or_else(Guess::unknown).costing(1),
        _ if returns_scalar(name) => Guess::scalar().costing(1),
        _ => Guess::unknown().costing(1),
    }
}

fn returns_scalar(name: &str) -> bool {
    const SCALARS: [&str; 10] = [
        "size",
        "int",
        "double",
        "bool",
        "getHours",
        "getMinutes",
        "getSeconds",
        "getFullYear",
        "isURL",
        operators::NOT_STRICTLY_FALSE,
    ];
    SCALARS.contains(&name) || [operators::LOGICAL_NOT, operators::NEGATE].contains(&name)
}

/// What reading an address or network costs, when it is still a text.
fn parsed(arguments: &[Guess<'_>]) -> u64 {
    arguments.first().filter(|argument| argument.kind == Kind::Text).map_or(0, |argument| letters(argument.size))
}

fn add<'d>(operands: &[Guess<'d>]) -> Guess<'d> {
    let [left, right] = operands else { return Guess::unknown() };
    let size = left.size.saturating_add(right.size);
    match (left.kind, right.kind) {
        (Kind::Scalar, _) | (_, Kind::Scalar) => Guess::scalar().costing(1),
        (Kind::List, _) | (_, Kind::List) => {
            let item_size = left.item().size.max(right.item().size);
            Guess { item_size, ..Guess::sized(Kind::List, size) }.costing(1)
        }
        _ => Guess::sized(Kind::Text, size).costing(letters(size)),
    }
}

/// Functions that look at every item of a list, or at every letter of a text.
fn over_items<'d>(name: &str, target: Option<&Guess<'d>>, own: u64) -> Guess<'d> {
    let Some(target) = target else { return Guess::scalar().costing(1) };
    let item = target.item();
    let cost = match (target.kind, item.kind) {
        (Kind::Text, _) => letters(own),
        (_, Kind::Text) => own.saturating_mul(1 + letters(item.size)),
        _ => own,
    };
    match name {
        "sum" | "max" | "min" => Guess { declared: None, ..item }.costing(cost),
        _ => Guess::scalar().costing(cost),
    }
}

/// The longest text that replacing can make: nothing may be replaced between all letters.
fn replaced(size: u64, by: u64) -> u64 {
    size.saturating_add(1).saturating_mul(by).saturating_add(size)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cel::parse;

    fn cost(schema: Value, rule: &str) -> u64 {
        let declared = Declared::read(&schema, false).unwrap();
        worst_cost(&parse(rule).unwrap(), &declared)
    }

    fn list(items: Value) -> Value {
        json!({"type": "array", "items": items})
    }

    fn map(values: Value) -> Value {
        json!({"type": "object", "additionalProperties": values})
    }

    /// The figures are upstream's.
    #[test]
    fn costs_are_upstreams() {
        let of = |kind: &str| json!({"type": kind});
        let format = |format: &str| json!({"type": "string", "format": format});
        let either = || json!({"x-kubernetes-int-or-string": true});
        let cases = [
            (list(of("number")), "self.all(x, true)", 4_718_591),
            (list(of("string")), "self.all(x, true)", 3_145_727),
            (list(of("boolean")), "self.all(x, true)", 1_887_437),
            (list(list(of("number"))), "self.all(x, true)", 3_145_727),
            (map(of("number")), "self.all(x, true)", 1_348_169),
            (map(of("number")), "has(self.x)", 1),
            (map(of("string")), "self.all(x, true)", 1_179_647),
            (of("string"), "self.contains('test')", 314_574),
            (of("string"), "self.startsWith('test')", 2),
            (of("string"), "size(self + \"hello\") > size(\"hello\")", 314_578),
            (list(of("number")), "self[1] == 0.0", 2),
            (list(of("string")), "self[1] == self[1]", 314_577),
            (of("string"), "self.matches(\"x\")", 314_574),
            (of("string"), "\"\".matches(\"(((((((((())))))))))[0-9]\")", 7),
            (of("string"), "self.matches(\"\")", 1),
            (map(of("string")), "self.all(x, x.contains(self[x]))", 2_752_507),
            (of("string"), "self == \"x\"", 2),
            (list(either()), "self.all(x, true)", 4_718_591),
            (list(either()), "self[0] == 5", 3),
            (list(list(of("number"))), "self[0][0] == -1.0", 3),
            (list(map(of("number"))), "self.all(x, x.y == 25.2)", 6_291_452),
            (list(map(of("number"))), "self[0].x > 2.0", 4),
            (list(format("duration")), "self.all(x, true)", 2_359_295),
            (list(format("duration")), "self[0].getHours() == 2", 4),
            (list(format("date")), "self.all(x, true)", 725_936),
            (list(format("date-time")), "self.all(x, true)", 428_963),
            (json!({"type": "string", "maxLength": 0}), "self == \"x\"", 1),
            (json!({"type": "string", "maxLength": 50}), "self.matches(\"x\")", 22),
            (
                json!({"type": "array", "maxItems": 10, "items": {"type": "number"}}),
                "self.all(x, self.all(y, true))",
                352,
            ),
        ];
        for (schema, rule, expected) in cases {
            assert_eq!(cost(schema.clone(), rule), expected, "{rule} of {schema}");
        }
        assert!(cost(list(of("number")), "self.all(x, self.all(y, true))") > PER_RULE);
    }
}
