//! Functions that Kubernetes adds to the language: regular expressions and lists
//! (<https://kubernetes.io/docs/reference/using-api/cel/#cel-options-language-features-and-libraries>).

use std::cmp::Ordering;
use std::sync::Arc;

use cel::extractors::This;
use cel::{Context, ExecutionError, Value};

type Answer = Result<Value, ExecutionError>;
type Text = Arc<String>;
type List = Arc<Vec<Value>>;

pub fn add(context: &mut Context<'_, '_>) {
    // The namespace of `escapeKey`, which is called like a method of it.
    context.add_variable_from_value("jsonpatch", Value::Null);
    let added = [
        context.add_function("find", find),
        context.add_function("findAll", find_all),
        context.add_function("isSorted", is_sorted),
        context.add_function("sum", sum),
        context.add_function("escapeKey", escape_key),
        context.add_function("min", |This(list): This<List>| extreme(&list, Ordering::Less, "min")),
        context.add_function("max", |This(list): This<List>| extreme(&list, Ordering::Greater, "max")),
    ];
    for failure in added.into_iter().filter_map(Result::err) {
        tracing::error!(?failure, "a function of the expression language cannot be added");
    }
}

fn pattern(text: &str, function: &str) -> Result<regex::Regex, ExecutionError> {
    regex::Regex::new(text).map_err(|error| ExecutionError::function_error(function, error))
}

fn find(This(text): This<Text>, regex: Text) -> Answer {
    let found = pattern(&regex, "find")?;
    let found = found.find(&text).map_or("", |found| found.as_str());
    Ok(Value::String(Arc::new(found.to_owned())))
}

fn find_all(This(text): This<Text>, regex: Text) -> Answer {
    let pattern = pattern(&regex, "findAll")?;
    let found = pattern.find_iter(&text).map(|found| Value::String(Arc::new(found.as_str().to_owned())));
    Ok(Value::List(Arc::new(found.collect())))
}

fn is_sorted(This(list): This<List>) -> Value {
    Value::Bool(list.windows(2).all(|pair| pair[0].partial_cmp(&pair[1]).is_some_and(Ordering::is_le)))
}

fn sum(This(list): This<List>) -> Answer {
    let Some((first, rest)) = list.split_first() else { return Ok(Value::Int(0)) };
    rest.iter().try_fold(first.clone(), |sum, item| sum + item.clone())
}

/// `jsonpatch.escapeKey("a/b")`: a key as a step of a JSON pointer.
fn escape_key(This(_): This<Value>, key: Text) -> Value {
    Value::String(Arc::new(key.replace('~', "~0").replace('/', "~1")))
}

fn extreme(list: &[Value], wanted: Ordering, function: &str) -> Answer {
    let Some((first, rest)) = list.split_first() else {
        return Err(ExecutionError::function_error(function, "called on an empty list"));
    };
    let found = rest.iter().fold(first, |best, item| if item.partial_cmp(best) == Some(wanted) { item } else { best });
    Ok(found.clone())
}
