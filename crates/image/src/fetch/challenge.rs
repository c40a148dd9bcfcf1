//! The `WWW-Authenticate` header (RFC 9110, section 11.6.1) as registries use it (distribution-spec;
//! token protocol: distribution.github.io, "Token Authentication Specification").

/// How a registry wants a request to be authenticated.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// From one header's value, with one challenge in it; None if it is neither kind or lacks its realm.
pub(super) fn parse(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    for (key, value) in parameters(rest) {
        match key.to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => scope = Some(value),
            _ => {}
        }
    }
    Some(Challenge::Bearer { realm: realm?, service, scope })
}

/// `key=value` or `key="value"`, separated by commas; stops at what it does not understand.
fn parameters(mut text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    loop {
        text = text.trim_start_matches([' ', ',', '\t']);
        let Some((key, rest)) = text.split_once('=') else { return found };
        let value;
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut plain = String::new();
            let mut characters = quoted.char_indices();
            let end = loop {
                match characters.next() {
                    None => return found,
                    Some((at, '"')) => break at,
                    Some((_, '\\')) => plain.extend(characters.next().map(|(_, character)| character)),
                    Some((_, character)) => plain.push(character),
                }
            };
            value = plain;
            text = &quoted[end + 1..];
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            value = rest[..end].trim().to_owned();
            text = &rest[end..];
        }
        found.push((key.trim().to_owned(), value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        assert_eq!(parse("Basic realm=\"x\""), Some(Challenge::Basic));
        let text =
            r#"Bearer realm="https://auth.example/token",service="reg, \"one\"",scope=repository:a/b:pull,error="x""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("reg, \"one\"".into()),
            scope: Some("repository:a/b:pull".into()),
        };
        assert_eq!(parse(text), Some(expected));
        for text in ["Bearer", "Bearer realm=\"open", "Negotiate x", ""] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
