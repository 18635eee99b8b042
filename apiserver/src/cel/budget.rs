//! What an evaluation may cost, in upstream's units: one for each name and step, ten for a list, a tenth for each letter
//! that is looked at. An expression is prepared once, so that it counts as it goes: each turn of a loop and each
//! operation on values whose size only the objects decide says what it costs. One that costs too much is stopped there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue, operators};
use cel::common::types::{CelBool, CelInt, CelList, CelMap, CelString, DYN_TYPE, INT_TYPE, STRING_TYPE};
use cel::common::value::{CowVal, Val};
use cel::{DeclarationError, Env, ExecutionError};

use super::library::value_type;
use super::regex_cache;

/// The most that one evaluation of an expression may cost.
pub const PER_CALL: u64 = 1_000_000;
/// The most that all rules of an object, or all expressions of a policy's binding, may cost together.
pub const PER_REQUEST: u64 = 10_000_000;
/// The most that all match conditions of a webhook or policy may cost together.
pub const PER_CONDITIONS: u64 = 2_500_000;

/// The variable that counts, and what is done with it. None of these names can be written in an expression.
pub const VARIABLE: &str = "@budget";
/// `@turn(@budget, cost, value)` is the value.
const TURN: &str = "@turn";
/// `@sized(@budget, value)` is the value, which costs by its size.
const SIZED: &str = "@sized";
/// The same, for what compares each item with each.
const SQUARED: &str = "@squared";
/// `matches`, with the budget before its arguments.
pub const MATCHES: &str = "@matches";

/// What the evaluations of a scope have cost.
#[derive(Clone, Debug, Default)]
pub struct Budget(Arc<Spent>);

#[derive(Debug, Default)]
struct Spent {
    call: AtomicU64,
    total: AtomicU64,
}

value_type!(Budget, "@budget");

impl PartialEq for Budget {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Budget {
    /// Begins an evaluation that costs this much before its loops are counted.
    pub fn begin(&self, cost: u64) {
        self.0.call.store(cost, Ordering::Relaxed);
    }

    /// Ends it. `false`: it cost too much.
    pub fn end(&self) -> bool {
        let cost = self.0.call.load(Ordering::Relaxed);
        self.0.total.fetch_add(cost, Ordering::Relaxed);
        cost <= PER_CALL
    }

    /// What all evaluations together have cost.
    pub fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }

    fn charge(&self, cost: u64) -> Result<(), ExecutionError> {
        let before = self.0.call.fetch_add(cost, Ordering::Relaxed);
        match before.saturating_add(cost) <= PER_CALL {
            true => Ok(()),
            false => Err(ExecutionError::function_error("cost", "actual cost limit exceeded")),
        }
    }
}

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    let budget = || Budget::cel_type().to_owned();
    env.add_overload(TURN, TURN, vec![budget(), INT_TYPE, DYN_TYPE], turn)?;
    env.add_overload(SIZED, SIZED, vec![budget(), DYN_TYPE], |arguments| by_size(arguments, |size| size))?;
    env.add_overload(SQUARED, SQUARED, vec![budget(), DYN_TYPE], |arguments| {
        by_size(arguments, |size| size.saturating_mul(size))
    })?;
    env.add_overload(MATCHES, MATCHES, vec![budget(), STRING_TYPE, STRING_TYPE], matches)
}

fn budget<'a>(arguments: &'a [CowVal<'_, '_>]) -> Result<&'a Budget, ExecutionError> {
    let budget = arguments.first().and_then(|first| first.downcast_ref::<Budget>());
    budget.ok_or_else(|| ExecutionError::function_error("cost", "there is no budget"))
}

fn turn<'b, 'v>(mut arguments: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let cost = arguments[1].downcast_ref::<CelInt>().map_or(1, |cost| cost.inner().unsigned_abs());
    budget(&arguments)?.charge(cost)?;
    Ok(arguments.swap_remove(2))
}

fn by_size<'b, 'v>(mut arguments: Vec<CowVal<'b, 'v>>, cost: fn(u64) -> u64) -> Result<CowVal<'b, 'v>, ExecutionError> {
    budget(&arguments)?.charge(cost(size(arguments[1].as_ref())))?;
    Ok(arguments.swap_remove(1))
}

/// What looking at all of a value costs.
fn size(value: &dyn Val) -> u64 {
    if let Some(text) = value.downcast_ref::<CelString<'_>>() {
        letters(text.inner())
    } else if let Some(list) = value.downcast_ref::<CelList<'_>>() {
        list.inner().iter().map(|item| size(item.as_ref())).sum::<u64>().max(1)
    } else if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        map.inner().values().map(|item| 1 + size(item.as_ref())).sum::<u64>().max(1)
    } else {
        1
    }
}

fn letters(text: &str) -> u64 {
    (text.len() as u64).div_ceil(10).max(1)
}

fn matches<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let text = |index: usize| {
        let text = arguments.get(index).and_then(|argument| argument.downcast_ref::<CelString<'_>>());
        text.ok_or_else(|| ExecutionError::function_error("matches", "wants strings"))
    };
    let (text, pattern) = (text(1)?.inner(), text(2)?.inner());
    let cost = letters(text).saturating_mul((pattern.len() as u64).div_ceil(4).max(1));
    budget(&arguments)?.charge(cost)?;
    let regex = regex_cache::get(pattern).map_err(|error| ExecutionError::function_error("matches", error))?;
    Ok(CowVal::owned(CelBool::from(regex.is_match(text))))
}

/// What a node of a prepared tree was before: itself, or what is counted with it.
pub fn counted(call: &CallExpr) -> Option<&IdedExpr> {
    matches!(call.func_name.as_str(), TURN | SIZED | SQUARED).then(|| call.args.last()).flatten()
}

/// Makes the expression count what it costs, and answers what it costs but for its loops.
pub fn prepare(tree: &mut IdedExpr) -> u64 {
    let id = tree.id;
    let own = |children: u64, cost: u64| children.saturating_add(cost);
    match &mut tree.expr {
        Expr::Unspecified | Expr::Literal(_) => 0,
        Expr::Ident(_) => 1,
        Expr::Select(select) => own(prepare(&mut select.operand), u64::from(!select.test)),
        Expr::List(list) => own(list.elements.iter_mut().map(prepare).sum(), 10),
        Expr::Map(map) => own(map.entries.iter_mut().map(|entry| prepare_entry(&mut entry.expr)).sum(), 30),
        Expr::Struct(literal) => own(literal.entries.iter_mut().map(|entry| prepare_entry(&mut entry.expr)).sum(), 40),
        Expr::Call(call) => prepare_call(call, id),
        Expr::Comprehension(comprehension) => prepare_loop(comprehension),
    }
}

fn prepare_entry(entry: &mut EntryExpr) -> u64 {
    match entry {
        EntryExpr::StructField(field) => prepare(&mut field.value),
        EntryExpr::MapEntry(entry) => prepare(&mut entry.key) + prepare(&mut entry.value),
    }
}

fn prepare_call(call: &mut CallExpr, id: u64) -> u64 {
    let children = call.target.as_deref_mut().into_iter().chain(&mut call.args);
    let cost: u64 = children.map(prepare).sum();
    match call.func_name.as_str() {
        operators::LOGICAL_AND | operators::LOGICAL_OR | operators::CONDITIONAL => return cost,
        "matches" => {
            call.func_name = MATCHES.into();
            let text = call.target.take().map(|target| *target);
            call.args.splice(0..0, [Some(budget_variable(id)), text].into_iter().flatten());
        }
        name => {
            let of_sets =
                matches!(call.target.as_deref(), Some(IdedExpr { expr: Expr::Ident(name), .. }) if name == "sets");
            if let Some(counting) = if of_sets { Some(SQUARED) } else { counting(name) } {
                let operands = call.target.as_deref_mut().into_iter().chain(&mut call.args);
                operands.filter(|operand| has_unknown_size(operand)).for_each(|operand| wrap(operand, counting, None));
            }
        }
    }
    cost + 1
}

/// How a function's operands are counted; `None`: it costs the same whatever they are.
fn counting(function: &str) -> Option<&'static str> {
    const SIZED_FUNCTIONS: [&str; 37] = [
        operators::EQUALS,
        operators::NOT_EQUALS,
        operators::LESS,
        operators::LESS_EQUALS,
        operators::GREATER,
        operators::GREATER_EQUALS,
        operators::ADD,
        operators::IN,
        "bytes",
        "charAt",
        "cidr",
        "contains",
        "decode",
        "encode",
        "endsWith",
        "escapeKey",
        "find",
        "findAll",
        "flatten",
        "format",
        "includes",
        "indexOf",
        "isSorted",
        "isURL",
        "join",
        "lastIndexOf",
        "lowerAscii",
        "max",
        "min",
        "replace",
        "reverse",
        "split",
        "startsWith",
        "string",
        "substring",
        "sum",
        "validate",
    ];
    const SQUARED_FUNCTIONS: [&str; 3] = ["distinct", "sort", "@sortByAssociatedKeys"];
    if SQUARED_FUNCTIONS.contains(&function) {
        Some(SQUARED)
    } else {
        SIZED_FUNCTIONS.contains(&function).then_some(SIZED)
    }
}

/// Whether only the evaluation shows how large a value is. What loops gather is counted by their turns; names before
/// the dot of a library's function are no values.
fn has_unknown_size(operand: &IdedExpr) -> bool {
    match &operand.expr {
        Expr::Literal(_) | Expr::List(_) | Expr::Map(_) | Expr::Unspecified => false,
        Expr::Ident(name) => !name.starts_with('@') && !super::check::NAMES.contains(&name.as_str()),
        _ => true,
    }
}

fn budget_variable(id: u64) -> IdedExpr {
    IdedExpr { id, expr: Expr::Ident(VARIABLE.into()) }
}

/// `operand` becomes `function(@budget, operand)`, with the cost between them if there is one.
fn wrap(operand: &mut IdedExpr, function: &str, cost: Option<u64>) {
    let id = operand.id;
    let cost = cost.map(|cost| {
        let cost = i64::try_from(cost).unwrap_or(i64::MAX);
        IdedExpr { id, expr: Expr::Literal(LiteralValue::Int(cost.into())) }
    });
    let args = [Some(budget_variable(id)), cost, Some(std::mem::take(operand))].into_iter().flatten().collect();
    *operand = IdedExpr { id, expr: Expr::Call(CallExpr { func_name: function.into(), target: None, args }) };
}

fn prepare_loop(c: &mut ComprehensionExpr) -> u64 {
    let once = [&mut c.iter_range, &mut c.accu_init, &mut c.result].into_iter().map(prepare).sum::<u64>();
    let turn = [&mut c.loop_cond, &mut c.loop_step].into_iter().map(prepare).sum::<u64>().max(1);
    let is_literal = matches!(c.loop_cond.expr, Expr::Literal(_));
    match appended(&mut c.loop_step).filter(|_| is_literal) {
        // The library appends in place where it sees such a loop: its form must stay.
        Some(part) => wrap(part, TURN, Some(turn)),
        None => wrap(&mut c.loop_cond, TURN, Some(turn)),
    }
    once + 1
}

/// Of `@result + [item]`, and of `guard ? @result + [item] : @result`, what is evaluated in each turn.
fn appended(step: &mut IdedExpr) -> Option<&mut IdedExpr> {
    let Expr::Call(call) = &mut step.expr else { return None };
    match call.func_name.as_str() {
        operators::CONDITIONAL => call.args.first_mut(),
        operators::ADD => match &mut call.args.get_mut(1)?.expr {
            Expr::List(list) => list.elements.first_mut(),
            _ => None,
        },
        _ => None,
    }
}
