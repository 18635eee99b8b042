//! Finds expressions that cannot work because of the types they use: fields that a kind does not have, operators on
//! types that they do not take, names that nobody declared. What is not known is taken to be right, so there are no
//! false complaints. The words are those of the reference implementation.

use std::collections::BTreeMap;
use std::fmt;

use apimachinery::schema::{Scalar, Schema, Shape};
use cel::IdedExpr;
use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, operators};

use super::budget;

/// What is known about a value.
#[derive(Clone, Debug)]
pub enum Type<'s> {
    /// Nothing.
    Dyn,
    Null,
    Bool,
    Int,
    Double,
    String,
    Bytes,
    Timestamp,
    Duration,
    List(Box<Type<'s>>),
    Map(Box<Type<'s>>),
    Object(&'s Schema),
    /// Known fields without a schema: the request, a policy's variables.
    Record(Variables<'s>),
}

impl fmt::Display for Type<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dyn => f.write_str("dyn"),
            Self::Null => f.write_str("null"),
            Self::Bool => f.write_str("bool"),
            Self::Int => f.write_str("int"),
            Self::Double => f.write_str("double"),
            Self::String => f.write_str("string"),
            Self::Bytes => f.write_str("bytes"),
            Self::Timestamp => f.write_str("timestamp"),
            Self::Duration => f.write_str("duration"),
            Self::List(item) => write!(f, "list({item})"),
            Self::Map(value) => write!(f, "map(string, {value})"),
            Self::Object(_) | Self::Record(_) => f.write_str("object"),
        }
    }
}

impl<'s> Type<'s> {
    pub fn of_schema(schema: &'s Schema) -> Self {
        match &schema.shape {
            Shape::Object(object) if object.preserve_unknown => Self::Dyn,
            Shape::Object(_) => Self::Object(schema),
            Shape::Map(map) => Self::Map(Box::new(Self::of_schema(&map.value))),
            Shape::List(list) => Self::List(Box::new(Self::of_schema(&list.item))),
            Shape::Scalar(Scalar::String | Scalar::Quantity | Scalar::Duration) => Self::String,
            Shape::Scalar(Scalar::Int32 | Scalar::Int64) => Self::Int,
            Shape::Scalar(Scalar::Bool) => Self::Bool,
            Shape::Scalar(Scalar::Double) => Self::Double,
            Shape::Scalar(Scalar::Bytes) => Self::Bytes,
            Shape::Scalar(Scalar::Time | Scalar::MicroTime) => Self::Timestamp,
            Shape::Scalar(Scalar::IntOrString) | Shape::Opaque(_) | Shape::PropsOr(_) => Self::Dyn,
        }
    }

    fn is_numeric(&self) -> bool {
        matches!(self, Self::Int | Self::Double)
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dyn, _) | (_, Self::Dyn) => true,
            (Self::List(a), Self::List(b)) | (Self::Map(a), Self::Map(b)) => a.is_same(b),
            (Self::Map(_), Self::Object(_)) | (Self::Object(_), Self::Map(_)) => true,
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

/// The variables of an expression, by name.
pub type Variables<'s> = BTreeMap<String, Type<'s>>;

/// What is wrong, and with which node of the tree.
pub struct Complaint {
    pub node: u64,
    pub text: String,
}

/// Types of the language, which are values there too, and the names before the dot of the libraries' functions.
pub const NAMES: [&str; 26] = [
    "base64",
    "bool",
    "bytes",
    "cidr",
    "double",
    "dyn",
    "format",
    "int",
    "ip",
    "jsonpatch",
    "list",
    "lists",
    "map",
    "math",
    "null_type",
    "optional",
    "optional_type",
    "quantity",
    "regex",
    "semver",
    "sets",
    "string",
    "strings",
    "type",
    "uint",
    "url",
];

/// The type of the expression, and everything that is wrong with it; other variables than these may be there.
pub fn check<'s>(tree: &IdedExpr, variables: &Variables<'s>) -> (Type<'s>, Vec<String>) {
    let (found, complaints) = run(tree, variables, false);
    (found, complaints.into_iter().map(|complaint| complaint.text).collect())
}

/// The same, where there are no other variables.
pub fn check_closed<'s>(tree: &IdedExpr, variables: &Variables<'s>) -> (Type<'s>, Vec<Complaint>) {
    run(tree, variables, true)
}

fn run<'s>(tree: &IdedExpr, variables: &Variables<'s>, closed: bool) -> (Type<'s>, Vec<Complaint>) {
    let mut checker = Checker { variables: variables.clone(), complaints: Vec::new(), closed };
    let found = checker.expression(tree);
    (found, checker.complaints)
}

struct Checker<'s> {
    variables: Variables<'s>,
    complaints: Vec<Complaint>,
    closed: bool,
}

impl<'s> Checker<'s> {
    fn complain(&mut self, node: u64, text: String) {
        self.complaints.push(Complaint { node, text });
    }

    fn named(&mut self, name: &str, node: u64) -> Type<'s> {
        if let Some(found) = self.variables.get(name) {
            return found.clone();
        }
        if self.closed && !NAMES.contains(&name) {
            self.complain(node, format!("undeclared reference to '{name}' (in container '')"));
        }
        Type::Dyn
    }

    fn expression(&mut self, tree: &IdedExpr) -> Type<'s> {
        match &tree.expr {
            Expr::Ident(name) => self.named(name, tree.id),
            Expr::Literal(literal) => literal_type(literal),
            Expr::Select(select) => {
                let operand = self.expression(&select.operand);
                let found = self.field(&operand, &select.field, tree.id);
                if select.test { Type::Bool } else { found }
            }
            Expr::List(list) => {
                let items: Vec<Type<'s>> = list.elements.iter().map(|item| self.expression(item)).collect();
                let item = items.first().filter(|first| items.iter().all(|item| item.is_same(first))).cloned();
                Type::List(Box::new(item.unwrap_or(Type::Dyn)))
            }
            Expr::Call(call) => self.call(call, tree.id),
            Expr::Comprehension(comprehension) => self.comprehension(comprehension),
            Expr::Map(map) => {
                map.entries.iter().for_each(|entry| self.entry(&entry.expr));
                Type::Dyn
            }
            Expr::Struct(_) | Expr::Unspecified => Type::Dyn,
        }
    }

    fn entry(&mut self, entry: &EntryExpr) {
        match entry {
            EntryExpr::StructField(field) => {
                self.expression(&field.value);
            }
            EntryExpr::MapEntry(entry) => {
                self.expression(&entry.key);
                self.expression(&entry.value);
            }
        }
    }

    fn field(&mut self, operand: &Type<'s>, field: &str, node: u64) -> Type<'s> {
        match operand {
            Type::Record(fields) => match fields.get(field) {
                Some(found) => found.clone(),
                None => {
                    self.complain(node, format!("undefined field '{field}'"));
                    Type::Dyn
                }
            },
            Type::Object(schema) => match schema.child(field) {
                Some(child) => Type::of_schema(child),
                None => {
                    self.complain(node, format!("undefined field '{field}'"));
                    Type::Dyn
                }
            },
            Type::Map(value) => (**value).clone(),
            Type::Dyn => Type::Dyn,
            other => {
                self.complain(node, format!("type '{other}' does not support field selection"));
                Type::Dyn
            }
        }
    }

    fn call(&mut self, call: &CallExpr, node: u64) -> Type<'s> {
        if let Some(counted) = budget::counted(call) {
            return self.expression(counted);
        }
        let target = call.target.as_deref().map(|target| self.expression(target));
        let arguments: Vec<Type<'s>> = call.args.iter().map(|argument| self.expression(argument)).collect();
        let name = call.func_name.as_str();
        match (target, arguments.as_slice()) {
            (None, [left, right]) => match binary(name, left, right) {
                Some(found) => found,
                None => {
                    let text = format!("found no matching overload for '{name}' applied to '({left}, {right})'");
                    self.complain(node, text);
                    Type::Dyn
                }
            },
            (None, [_, yes, no]) if name == operators::CONDITIONAL && yes.is_same(no) => yes.clone(),
            (None, [_]) if name == operators::LOGICAL_NOT => Type::Bool,
            (None, _) if name == budget::MATCHES => Type::Bool,
            (None, [_]) | (Some(_), []) if name == "size" => Type::Int,
            (Some(_), _) if matches!(name, "startsWith" | "endsWith" | "contains" | "matches") => Type::Bool,
            _ => Type::Dyn,
        }
    }

    /// What macros (`all`, `exists`, `map`, …) become: the loop's variable has the type of the items.
    fn comprehension(&mut self, c: &ComprehensionExpr) -> Type<'s> {
        let item = match self.expression(&c.iter_range) {
            Type::List(item) => *item,
            Type::Map(_) => Type::String,
            _ => Type::Dyn,
        };
        let start = self.expression(&c.accu_init);
        let outer = self.variables.clone();
        self.variables.insert(c.iter_var.clone(), item);
        if let Some(second) = &c.iter_var2 {
            self.variables.insert(second.clone(), Type::Dyn);
        }
        self.variables.insert(c.accu_var.clone(), Type::Dyn);
        self.expression(&c.loop_step);
        self.variables = outer.clone();
        self.variables.insert(c.accu_var.clone(), start);
        let found = self.expression(&c.result);
        self.variables = outer;
        found
    }
}

fn literal_type<'s>(literal: &LiteralValue) -> Type<'s> {
    match literal {
        LiteralValue::Boolean(_) => Type::Bool,
        LiteralValue::Bytes(_) => Type::Bytes,
        LiteralValue::Double(_) => Type::Double,
        LiteralValue::Int(_) => Type::Int,
        LiteralValue::UInt(_) => Type::Dyn,
        LiteralValue::Null => Type::Null,
        LiteralValue::String(_) => Type::String,
    }
}

/// The type of an operator's result; `None`: it does not take these types.
fn binary<'s>(operator: &str, left: &Type<'s>, right: &Type<'s>) -> Option<Type<'s>> {
    let unknown = matches!(left, Type::Dyn) || matches!(right, Type::Dyn);
    match operator {
        operators::GREATER | operators::LESS | operators::GREATER_EQUALS | operators::LESS_EQUALS => {
            let orders =
                |t: &Type<'_>| matches!(t, Type::Bool | Type::String | Type::Bytes | Type::Timestamp | Type::Duration);
            let fits = unknown || (left.is_numeric() && right.is_numeric()) || (left.is_same(right) && orders(left));
            fits.then_some(Type::Bool)
        }
        operators::EQUALS | operators::NOT_EQUALS => {
            let with_null = matches!(left, Type::Null) || matches!(right, Type::Null);
            let fits = left.is_same(right) || with_null || (left.is_numeric() && right.is_numeric());
            fits.then_some(Type::Bool)
        }
        operators::ADD => match (left, right) {
            (Type::Timestamp | Type::Duration, _) | (_, Type::Timestamp | Type::Duration) => Some(Type::Dyn),
            _ if unknown => Some(Type::Dyn),
            (Type::String | Type::Bytes | Type::Int | Type::Double | Type::List(_), _) if left.is_same(right) => {
                Some(left.clone())
            }
            _ => None,
        },
        operators::SUBSTRACT | operators::MULTIPLY | operators::DIVIDE | operators::MODULO => match (left, right) {
            (Type::Timestamp | Type::Duration, _) => Some(Type::Dyn),
            _ if unknown => Some(Type::Dyn),
            _ => (left.is_numeric() && left.is_same(right)).then(|| left.clone()),
        },
        operators::LOGICAL_AND | operators::LOGICAL_OR => {
            let is_bool = |t: &Type<'_>| matches!(t, Type::Bool | Type::Dyn);
            (is_bool(left) && is_bool(right)).then_some(Type::Bool)
        }
        operators::INDEX => match left {
            Type::List(item) => Some((**item).clone()),
            Type::Map(value) => Some((**value).clone()),
            _ => Some(Type::Dyn),
        },
        operators::IN => Some(Type::Bool),
        _ => Some(Type::Dyn),
    }
}

#[cfg(test)]
mod tests {
    use apimachinery::meta::GroupVersionKind;

    use super::*;
    use crate::cel::Expression;

    #[test]
    fn complaints_are_the_reference_implementations() {
        let schema = apimachinery::schema::builtin().kind(&GroupVersionKind::new("apps", "v1", "Deployment")).unwrap();
        let variables = Variables::from([("object".to_owned(), Type::of_schema(schema))]);
        let cases = [
            ("object.spec.replicas > 1", None),
            ("object.spec.replicas > '1'", Some("found no matching overload for '_>_' applied to '(int, string)'")),
            ("'got ' + object.spec.replicas", Some("found no matching overload for '_+_' applied to '(string, int)'")),
            ("object.spec.maxRetries < 10", Some("undefined field 'maxRetries'")),
            (
                "object.spec.template.spec.containers.all(c, c.image.startsWith('a') && c.nope == 1)",
                Some("undefined field 'nope'"),
            ),
            ("has(object.metadata.labels) && object.metadata.labels['a'] == 'b'", None),
            ("variables.x > 1 && params.y == 'z'", None),
        ];
        for (source, expected) in cases {
            let (_, complaints) = check(Expression::compile(source).unwrap().tree(), &variables);
            assert_eq!(complaints.first().map(String::as_str), expected, "{source}");
        }
    }
}
