//! What Kubernetes adds to the language, one file for each of its libraries
//! (<https://kubernetes.io/docs/reference/using-api/cel/#cel-options-language-features-and-libraries>). Everything is
//! declared once, when the environment is built: an evaluation adds nothing.

pub mod authorizer;
mod format;
mod lists;
mod network;
mod quantity;
mod semver;
mod sets;
mod text;
mod url;

use cel::common::value::{CowVal, Val};
use cel::{DeclarationError, Env, ExecutionError};

/// Declares all of it.
pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    let libraries = [
        authorizer::extension,
        format::extension,
        lists::extension,
        network::extension,
        quantity::extension,
        semver::extension,
        sets::extension,
        text::extension,
        url::extension,
    ];
    libraries.into_iter().try_for_each(|library| library(env))
}

/// Makes a Rust type a type of the language, with this name there. Its values are compared by `PartialEq`.
macro_rules! value_type {
    ($rust:ty, $name:literal) => {
        impl cel::common::value::Val for $rust {
            fn get_type(&self) -> &cel::common::types::Type {
                <Self as cel::common::value::Val>::cel_type()
            }

            fn cel_type() -> &'static cel::common::types::Type {
                static TYPE: cel::common::types::Type = cel::common::types::Type::new_unspecified_type($name);
                &TYPE
            }

            fn equals(&self, other: &dyn cel::common::value::Val) -> bool {
                other.downcast_ref::<$rust>().is_some_and(|other| self == other)
            }

            fn clone_as_boxed<'v>(&self) -> Box<dyn cel::common::value::Val + 'v>
            where
                Self: 'v,
            {
                Box::new(self.clone())
            }

            fn as_any(&self) -> Option<&dyn std::any::Any> {
                Some(self)
            }
        }

        impl cel::common::value::StaticVal for $rust {}
    };
}
pub(super) use value_type;

/// An error of a function, in its own words.
fn failure(function: &str, why: impl std::fmt::Display) -> ExecutionError {
    ExecutionError::function_error(function, why)
}

/// The items of a list, for functions that take any list.
fn items<'b, 'v>(function: &str, list: &'b CowVal<'_, 'v>) -> Result<Vec<&'b (dyn Val + 'v)>, ExecutionError> {
    let list = list.as_iterable().ok_or_else(|| failure(function, "not a list"))?;
    let mut iterator = list.iter();
    Ok(std::iter::from_fn(|| iterator.next()).collect())
}
