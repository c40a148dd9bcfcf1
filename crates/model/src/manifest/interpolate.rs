//! Variables in values: `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME?message}` and their kin, as the
//! Compose specification defines them. `$$` is a dollar sign.

use std::collections::BTreeMap;

use thiserror::Error;

/// Deepest nesting of variables in defaults.
const MAX_DEPTH: usize = 8;
/// Longest value after interpolation, in bytes.
const MAX_VALUE_BYTES: usize = 256 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum InterpolateError {
    #[error("the variable {name} is not set")]
    NotSet { name: String },
    #[error("the variable {name} is required: {message}")]
    Required { name: String, message: String },
    #[error("{text:?} is not a variable")]
    Malformed { text: String },
    #[error("variables are nested too deep or make the value too long")]
    TooLarge,
}

impl InterpolateError {
    pub fn hint(&self) -> String {
        match self {
            Self::NotSet { name } => format!("set it, or write ${{{name}:-default}}"),
            Self::Required { name, .. } => format!("set {name}"),
            Self::Malformed { .. } => "write ${NAME} or ${NAME:-default}; a dollar sign itself is $$".to_owned(),
            Self::TooLarge => "put the value into a variable of its own".to_owned(),
        }
    }
}

/// The text with its variables replaced.
pub(super) fn interpolate(text: &str, vars: &BTreeMap<String, String>) -> Result<String, InterpolateError> {
    expand(text, vars, 0)
}

fn expand(text: &str, vars: &BTreeMap<String, String>, depth: usize) -> Result<String, InterpolateError> {
    if depth > MAX_DEPTH {
        return Err(InterpolateError::TooLarge);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some(body) = after.strip_prefix('{') {
            let end = closing(body).ok_or_else(|| malformed(&rest[at..]))?;
            out.push_str(&braced(&body[..end], vars, depth)?);
            rest = &body[end + 1..];
        } else {
            let end = name_end(after);
            if end == 0 {
                return Err(malformed(&rest[at..]));
            }
            let name = &after[..end];
            let value = vars.get(name).ok_or_else(|| InterpolateError::NotSet { name: name.to_owned() })?;
            out.push_str(value);
            rest = &after[end..];
        }
        if out.len() > MAX_VALUE_BYTES {
            return Err(InterpolateError::TooLarge);
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn malformed(text: &str) -> InterpolateError {
    InterpolateError::Malformed { text: text.chars().take(40).collect() }
}

/// Where the brace that was opened before `body` is closed.
fn closing(body: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut previous = ' ';
    for (at, c) in body.char_indices() {
        match c {
            '{' if previous == '$' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
        previous = c;
    }
    None
}

/// The length of the variable name at the start of `text`; 0 if there is none.
fn name_end(text: &str) -> usize {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return 0;
    }
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len())
}

fn braced(body: &str, vars: &BTreeMap<String, String>, depth: usize) -> Result<String, InterpolateError> {
    let wrong = || malformed(&format!("${{{body}}}"));
    let (name, operator) = body.split_at(name_end(body));
    if name.is_empty() {
        return Err(wrong());
    }
    let value = vars.get(name);
    let (operator, set) = match operator.strip_prefix(':') {
        // With a colon an empty value counts as not set.
        Some(operator) => (operator, value.filter(|v| !v.is_empty())),
        None => (operator, value),
    };
    let mut chars = operator.chars();
    let kind = chars.next();
    let word = chars.as_str();
    match (kind, set) {
        (None, _) if body.ends_with(':') => Err(wrong()),
        (None | Some('-' | '?'), Some(value)) => Ok(value.clone()),
        (None, None) => Err(InterpolateError::NotSet { name: name.to_owned() }),
        (Some('-'), None) | (Some('+'), Some(_)) => expand(word, vars, depth + 1),
        (Some('+'), None) => Ok(String::new()),
        (Some('?'), None) if word.is_empty() => Err(InterpolateError::NotSet { name: name.to_owned() }),
        (Some('?'), None) => {
            Err(InterpolateError::Required { name: name.to_owned(), message: expand(word, vars, depth + 1)? })
        }
        (Some(_), _) => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_compose_specification() {
        let vars = BTreeMap::from([("A".to_owned(), "x".to_owned()), ("E".to_owned(), String::new())]);
        let good = [
            ("plain", "plain"),
            ("$A-${A}.$$A", "x-x.$A"),
            ("${N:-d}${N-d}", "dd"),
            ("${E:-d}|${E-d}", "d|"),
            ("${A:-d}${A-d}${A?m}${A:?m}", "xxxx"),
            ("${N:+y}${A:+y}${E:+y}${E+y}", "yy"),
            ("${N:-${A}:${M:-z}}}", "x:z}"),
            ("100%", "100%"),
        ];
        for (text, expected) in good {
            assert_eq!(interpolate(text, &vars).as_deref(), Ok(expected), "{text}");
        }
        for text in ["$", "${", "${}", "${A", "$1", "${A:}", "${A*}", "${-x}", "$ A", "${N}", "$N", "${N?}", "${N:?no}"]
        {
            assert!(interpolate(text, &vars).is_err(), "{text}");
        }
        let deep = "${N:-".repeat(20) + &"}".repeat(20);
        assert_eq!(interpolate(&deep, &vars), Err(InterpolateError::TooLarge));
    }
}
