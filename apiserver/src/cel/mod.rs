//! The Common Expression Language as the API uses it: in match conditions, admission policies and schemas of custom
//! resources. The language itself is a library's; here are the variables, the functions that Kubernetes adds
//! (<https://kubernetes.io/docs/reference/using-api/cel/>), and how objects become values and values objects.

pub mod budget;
pub mod check;
mod json;
pub mod library;
mod regex_cache;
mod rewrite;
pub mod verify;

use std::sync::{Arc, LazyLock};

use budget::Budget;
use cel::common::types::{CelBool, CelString};
use cel::common::value::Val;
use cel::{Context, Env, ExecutionError, IdedExpr, Value};
pub use json::{from_json, map, to_json};

static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(environment()));

fn environment() -> Env {
    use cel::extensions::{encoders, lists, math, strings};
    let mut env = Env::stdlib().with_optional_support(true);
    for extension in [strings, lists, math, encoders, library::extension, budget::extension] {
        env.add_extension(extension).expect("no two extensions declare the same");
    }
    env
}

#[derive(Debug, thiserror::Error)]
pub enum CelError {
    #[error("compilation failed: {0}")]
    Compile(String),
    #[error("expression '{source_text}' resulted in error: {why}")]
    Evaluate { source_text: String, why: String },
    #[error("expression '{source_text}' resulted in error: operation cancelled: actual cost limit exceeded")]
    Cost { source_text: String },
    #[error("expression '{source_text}' does not result in a {expected}")]
    Type { source_text: String, expected: &'static str },
}

/// The tree of an expression, as it was written.
pub fn parse(source: &str) -> Result<IdedExpr, CelError> {
    let parsed = ENVIRONMENT.parser().parse(source);
    let mut tree = parsed.map_err(|errors| CelError::Compile(errors.to_string()))?;
    rewrite::objects_as_maps(&mut tree);
    Ok(tree)
}

/// A compiled expression, ready to count what it costs.
#[derive(Debug)]
pub struct Expression {
    source: String,
    tree: IdedExpr,
    /// What it costs, but for its loops.
    cost: u64,
}

impl Expression {
    pub fn compile(source: &str) -> Result<Self, CelError> {
        let mut tree = parse(source)?;
        let cost = budget::prepare(&mut tree);
        Ok(Self { source: source.to_owned(), tree, cost })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    pub fn tree(&self) -> &IdedExpr {
        &self.tree
    }

    /// Whether the expression looks at a variable.
    pub fn uses(&self, variable: &str) -> bool {
        self.tree.references().has_variable(variable)
    }

    /// The result, which may be of a type that only expressions know.
    pub fn evaluate(&self, scope: &Scope) -> Result<Box<dyn Val>, CelError> {
        scope.budget.begin(self.cost);
        let result = Value::resolve_val(&self.tree, &scope.context).map(|value| value.into_owned());
        if !scope.budget.end() {
            return Err(CelError::Cost { source_text: self.source.clone() });
        }
        result.map_err(|error| CelError::Evaluate { source_text: self.source.clone(), why: reason(&error) })
    }

    pub fn evaluate_bool(&self, scope: &Scope) -> Result<bool, CelError> {
        let answer = self.evaluate(scope)?.downcast_ref::<CelBool>().map(|answer| *answer.inner());
        answer.ok_or_else(|| CelError::Type { source_text: self.source.clone(), expected: "bool" })
    }

    pub fn evaluate_string(&self, scope: &Scope) -> Result<String, CelError> {
        let value = self.evaluate(scope)?;
        let text = value.downcast_ref::<CelString<'_>>().map(|text| text.inner().to_owned());
        text.ok_or_else(|| CelError::Type { source_text: self.source.clone(), expected: "string" })
    }
}

/// The words of the reference implementation, where users look for them.
fn reason(error: &ExecutionError) -> String {
    match error {
        ExecutionError::NoSuchKey(key) => format!("no such key: {key}"),
        ExecutionError::FunctionError { message, .. } => message.clone(),
        ExecutionError::IndexOutOfBounds(index) => match index {
            Value::Int(index) => format!("index out of bounds: {index}"),
            index => format!("index out of bounds: {index:?}"),
        },
        ExecutionError::DivisionByZero(_) => "division by zero".into(),
        ExecutionError::RemainderByZero(_) => "modulus by zero".into(),
        ExecutionError::Overflow(..) => "integer overflow".into(),
        ExecutionError::NoSuchOverload(_) => "no such overload".into(),
        error => error.to_string(),
    }
}

/// The variables that an expression sees, and what all evaluations with them have cost.
pub struct Scope {
    context: Context<'static, 'static>,
    budget: Budget,
}

impl Default for Scope {
    fn default() -> Self {
        let mut context = Context::with_env(ENVIRONMENT.clone());
        let budget = Budget::default();
        context.add_variable_as_val(budget::VARIABLE, Box::new(budget.clone()));
        Self { context, budget }
    }
}

impl Scope {
    pub fn set(&mut self, name: &str, value: Box<dyn Val>) {
        self.context.add_variable_as_val(name, value);
    }

    pub fn set_json(&mut self, name: &str, value: &serde_json::Value) {
        self.set(name, from_json(value));
    }

    /// What the evaluations have cost so far.
    pub fn spent(&self) -> u64 {
        self.budget.total()
    }
}

/// A function of the language, called with one text: `timestamp`, `duration`. `None`: it does not take it.
pub fn convert(function: &str, text: &str) -> Option<Box<dyn Val>> {
    use cel::common::value::CowVal;
    let arguments = vec![CowVal::owned(CelString::from(text.to_owned()))];
    let convert = ENVIRONMENT.find_overload(function, &arguments)?;
    convert(arguments).ok().map(CowVal::into_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scope() -> Scope {
        let mut scope = Scope::default();
        let object =
            json!({"metadata": {"name": "web-1", "labels": {"a/b": "c"}}, "spec": {"replicas": 3, "list": [1, 2, 3]}});
        scope.set_json("object", &object);
        scope.set_json("oldObject", &serde_json::Value::Null);
        scope
    }

    #[test]
    fn conditions_are_answered() {
        let cases = [
            ("object.spec.replicas + 1 == 4", true),
            ("has(object.spec.missing)", false),
            ("oldObject == null", true),
            ("object.metadata.name.startsWith('web') && object.spec.list.all(x, x > 0)", true),
            ("'a/b' in object.metadata.labels", true),
            ("object.?spec.?missing.orValue(7) == 7", true),
            ("object.metadata.name.find('[0-9]+') == '1'", true),
            ("object.spec.list.sum() == 6 && [1, 3, 2].max() == 3 && !([2, 1].isSorted())", true),
            ("object.metadata.name.split('-')[1] == '1'", true),
        ];
        for (source, expected) in cases {
            let answer = Expression::compile(source).unwrap().evaluate_bool(&scope());
            assert_eq!(answer.unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn errors_name_the_expression() {
        let missing = Expression::compile("object.spec.missing == 1").unwrap().evaluate_bool(&scope()).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "expression 'object.spec.missing == 1' resulted in error: no such key: missing"
        );
        assert!(Expression::compile("object.spec.").is_err());
        assert!(Expression::compile("1").unwrap().evaluate_bool(&scope()).is_err());
    }

    #[test]
    fn objects_are_built() {
        let source = "Object{spec: Object.spec{replicas: object.spec.replicas * 2, on: true}}";
        let value = Expression::compile(source).unwrap().evaluate(&scope()).unwrap();
        assert_eq!(to_json(value.as_ref()).unwrap(), json!({"spec": {"replicas": 6, "on": true}}));
    }
}
