//! Functions on lists: order, sums, extremes, positions.

use std::cmp::Ordering;

use cel::common::types::{CelBool, CelInt, DYN_TYPE, LIST_TYPE};
use cel::common::value::{CowVal, Val};
use cel::{DeclarationError, Env, ExecutionError};

use super::{failure, items};

type Answer<'b, 'v> = Result<CowVal<'b, 'v>, ExecutionError>;

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_member_overload("isSorted", "list_is_sorted", LIST_TYPE, vec![], is_sorted)?;
    env.add_member_overload("sum", "list_sum", LIST_TYPE, vec![], sum)?;
    env.add_member_overload("min", "list_min", LIST_TYPE, vec![], min)?;
    env.add_member_overload("max", "list_max", LIST_TYPE, vec![], max)?;
    env.add_member_overload("indexOf", "list_a_index_of_int", LIST_TYPE, vec![DYN_TYPE], index_of)?;
    env.add_member_overload("lastIndexOf", "list_a_last_index_of_int", LIST_TYPE, vec![DYN_TYPE], last_index_of)?;
    env.add_member_overload("includes", "list_includes_dyn_dyn", DYN_TYPE, vec![DYN_TYPE], includes)
}

fn compare(function: &str, left: &dyn Val, right: &dyn Val) -> Result<Ordering, ExecutionError> {
    let comparer = left.as_comparer().ok_or_else(|| failure(function, "the items of the list have no order"))?;
    comparer.compare(right)
}

fn is_sorted<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    let items = items("isSorted", &arguments[0])?;
    for pair in items.windows(2) {
        if compare("isSorted", pair[0], pair[1])?.is_gt() {
            return Ok(CowVal::owned(CelBool::from(false)));
        }
    }
    Ok(CowVal::owned(CelBool::from(true)))
}

fn sum<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    let items = items("sum", &arguments[0])?;
    let Some((first, rest)) = items.split_first() else { return Ok(CowVal::owned(CelInt::from(0))) };
    let mut sum: Box<dyn Val + 'v> = first.clone_as_boxed();
    for item in rest {
        let adder = sum.as_adder().ok_or_else(|| failure("sum", "the items of the list cannot be added"))?;
        let next = adder.add(*item)?.into_owned();
        sum = next;
    }
    Ok(CowVal::Owned(sum))
}

fn min<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    extreme(&arguments[0], "min", Ordering::Less)
}

fn max<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    extreme(&arguments[0], "max", Ordering::Greater)
}

fn extreme<'b, 'v>(list: &CowVal<'_, 'v>, function: &str, wanted: Ordering) -> Answer<'b, 'v> {
    let items = items(function, list)?;
    let Some((first, rest)) = items.split_first() else {
        return Err(failure(function, format!("{function} called on empty list")));
    };
    let mut best = *first;
    for item in rest {
        if compare(function, *item, best)? == wanted {
            best = *item;
        }
    }
    Ok(CowVal::Owned(best.clone_as_boxed()))
}

fn position(index: Option<usize>) -> CelInt {
    index.and_then(|index| i64::try_from(index).ok()).unwrap_or(-1).into()
}

fn index_of<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    let found = items("indexOf", &arguments[0])?.iter().position(|item| item.equals(arguments[1].as_ref()));
    Ok(CowVal::owned(position(found)))
}

fn last_index_of<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    let found = items("lastIndexOf", &arguments[0])?.iter().rposition(|item| item.equals(arguments[1].as_ref()));
    Ok(CowVal::owned(position(found)))
}

/// Whether a list has the item; a value that is no list is looked at as the only item of one.
fn includes<'b, 'v>(arguments: Vec<CowVal<'b, 'v>>) -> Answer<'b, 'v> {
    let (whole, wanted) = (arguments[0].as_ref(), arguments[1].as_ref());
    let found = match *whole.get_type() == LIST_TYPE {
        true => items("includes", &arguments[0])?.iter().any(|item| item.equals(wanted)),
        false => whole.equals(wanted),
    };
    Ok(CowVal::owned(CelBool::from(found)))
}
