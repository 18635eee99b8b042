//! `sets.contains`, `sets.equivalent` and `sets.intersects`: lists looked at as sets.

use cel::common::types::{CelBool, LIST_TYPE};
use cel::common::value::{CowVal, Val};
use cel::{DeclarationError, Env, ExecutionError};

use super::items;

type Answer<'b, 'v> = Result<CowVal<'b, 'v>, ExecutionError>;

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    let two = || vec![LIST_TYPE, LIST_TYPE];
    env.add_overload("sets.contains", "list_sets_contains_list", two(), contains)?;
    env.add_overload("sets.equivalent", "list_sets_equivalent_list", two(), equivalent)?;
    env.add_overload("sets.intersects", "list_sets_intersects_list", two(), intersects)
}

fn has(all: &[&dyn Val], wanted: &dyn Val) -> bool {
    all.iter().any(|item| item.equals(wanted))
}

fn answer<'b, 'v>(
    function: &str,
    lists: &[CowVal<'b, 'v>],
    holds: impl Fn(&[&dyn Val], &[&dyn Val]) -> bool,
) -> Answer<'b, 'v> {
    let (left, right) = (items(function, &lists[0])?, items(function, &lists[1])?);
    Ok(CowVal::owned(CelBool::from(holds(&left, &right))))
}

fn contains<'b, 'v>(lists: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    answer("sets.contains", &lists, |left, right| right.iter().all(|item| has(left, *item)))
}

fn equivalent<'b, 'v>(lists: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    answer("sets.equivalent", &lists, |left, right| {
        right.iter().all(|item| has(left, *item)) && left.iter().all(|item| has(right, *item))
    })
}

fn intersects<'b, 'v>(lists: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    answer("sets.intersects", &lists, |left, right| left.iter().any(|item| has(right, *item)))
}
