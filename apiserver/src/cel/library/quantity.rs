//! Resource quantities: `quantity("1.5Gi")`, compared and added exactly.

use std::cmp::Ordering;

use apimachinery::meta::{Quantity, QuantityError, QuantityFormat};
use cel::common::types::{CelBool, CelDouble, CelInt, CelString};
use cel::common::value::Val;
use cel::{DeclarationError, Env, ExecutionError};

use super::{failure, value_type};

#[derive(Clone, Debug, PartialEq)]
struct Amount(Quantity);

value_type!(Amount, "kubernetes.Quantity");

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(Amount::cel_type().to_owned())?;
    cel::add_overload!(env, fn quantity: (CelString) -> Result<Amount>)?;
    cel::add_overload!(env, fn is_quantity: (CelString) -> CelBool)?;
    cel::add_member_overload!(env, fn sign: (Amount) -> CelInt)?;
    cel::add_member_overload!(env, fn is_greater_than: (Amount, Amount) -> CelBool)?;
    cel::add_member_overload!(env, fn is_less_than: (Amount, Amount) -> CelBool)?;
    cel::add_member_overload!(env, fn compare_to: (Amount, Amount) -> CelInt)?;
    cel::add_member_overload!(env, fn as_approximate_float: (Amount) -> CelDouble)?;
    cel::add_member_overload!(env, fn as_integer: (Amount) -> Result<CelInt>)?;
    cel::add_member_overload!(env, fn is_integer: (Amount) -> CelBool)?;
    cel::add_member_overload!(env, fn add: (Amount, Amount) -> Amount)?;
    cel::add_member_overload!(env, fn add_int: (Amount, CelInt) -> Amount, name = "add")?;
    cel::add_member_overload!(env, fn sub: (Amount, Amount) -> Amount)?;
    cel::add_member_overload!(env, fn sub_int: (Amount, CelInt) -> Amount, name = "sub")
}

fn quantity(text: &CelString<'_>) -> Result<Amount, ExecutionError> {
    text.inner().parse().map(Amount).map_err(|error: QuantityError| failure("quantity", error))
}

fn is_quantity(text: &CelString<'_>) -> CelBool {
    text.inner().parse::<Quantity>().is_ok().into()
}

fn sign(amount: &Amount) -> CelInt {
    i64::from(amount.0.signum()).into()
}

/// -1, 0 or 1.
fn number(order: Ordering) -> CelInt {
    CelInt::from(order as i64)
}

fn compare_to(amount: &Amount, other: &Amount) -> CelInt {
    number(amount.0.cmp(&other.0))
}

fn is_greater_than(amount: &Amount, other: &Amount) -> CelBool {
    (amount.0 > other.0).into()
}

fn is_less_than(amount: &Amount, other: &Amount) -> CelBool {
    (amount.0 < other.0).into()
}

fn as_approximate_float(amount: &Amount) -> CelDouble {
    amount.0.as_f64().into()
}

fn as_integer(amount: &Amount) -> Result<CelInt, ExecutionError> {
    let whole = amount.0.whole().ok_or_else(|| failure("asInteger", "cannot convert value to integer"))?;
    Ok(whole.into())
}

fn is_integer(amount: &Amount) -> CelBool {
    amount.0.whole().is_some().into()
}

fn add(amount: &Amount, other: &Amount) -> Amount {
    Amount(amount.0.add(other.0))
}

fn sub(amount: &Amount, other: &Amount) -> Amount {
    Amount(amount.0.sub(other.0))
}

fn units(number: &CelInt) -> Quantity {
    Quantity::from_value(*number.inner(), QuantityFormat::DecimalExponent)
}

fn add_int(amount: &Amount, number: &CelInt) -> Amount {
    Amount(amount.0.add(units(number)))
}

fn sub_int(amount: &Amount, number: &CelInt) -> Amount {
    Amount(amount.0.sub(units(number)))
}
