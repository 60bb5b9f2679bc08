//! Which plugin changed what, so that no two change the same.

use slipway_proto::nri::{Field, FieldOwners, OwningPlugins};

use crate::error::NriError;
use crate::name::{is_removal, removal};

/// Who changed what, of all containers that one event is about.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Owners(pub OwningPlugins);

impl Owners {
    /// The plugin sets this field, or this entry of it, of a container.
    ///
    /// # Errors
    /// [`NriError::Conflict`] when another one has. Who has removed the other's before may set its own.
    pub fn claim(
        &mut self,
        container: &str,
        field: Field,
        entry: Option<&str>,
        plugin: &str,
    ) -> Result<(), NriError> {
        let owner = self.owner_mut(container, field, entry);
        let holder = match is_removal(owner) {
            Some(remover) if remover == plugin => "",
            Some(remover) => remover,
            None => owner.as_str(),
        };
        if !holder.is_empty() {
            return Err(NriError::Conflict {
                first: holder.to_owned(),
                second: plugin.to_owned(),
                field: label(field, entry),
                container: container.to_owned(),
            });
        }
        plugin.clone_into(owner);
        Ok(())
    }

    /// The plugin removes what there was.
    pub fn clear(&mut self, container: &str, field: Field, entry: Option<&str>, plugin: &str) {
        *self.owner_mut(container, field, entry) = removal(plugin);
    }

    /// The plugin adds to what all may add to.
    pub fn share(&mut self, container: &str, field: Field, plugin: &str) {
        let owners = self.owner_mut(container, field, None);
        if !owners.is_empty() {
            owners.push(',');
        }
        owners.push_str(plugin);
    }

    /// Who has set this, if anybody.
    pub fn of(&self, container: &str, field: Field, entry: Option<&str>) -> Option<&str> {
        let fields = self.0.owners.get(container)?;
        let owner = match entry {
            None => fields.simple.get(&(field as i32)),
            Some(entry) => fields.compound.get(&(field as i32))?.owners.get(entry),
        };
        owner
            .map(String::as_str)
            .filter(|o| is_removal(o).is_none())
    }

    /// Who has set entries of this field, with the entries.
    pub fn all_of(&self, container: &str, field: Field) -> Vec<(&str, &str)> {
        let compound = (self.0.owners.get(container)).and_then(|f| f.compound.get(&(field as i32)));
        let owners = compound.into_iter().flat_map(|c| &c.owners);
        owners
            .map(|(entry, owner)| (entry.as_str(), owner.as_str()))
            .collect()
    }

    fn owner_mut(&mut self, container: &str, field: Field, entry: Option<&str>) -> &mut String {
        let fields: &mut FieldOwners = self.0.owners.entry(container.to_owned()).or_default();
        match entry {
            None => fields.simple.entry(field as i32).or_default(),
            Some(entry) => {
                let compound = fields.compound.entry(field as i32).or_default();
                compound.owners.entry(entry.to_owned()).or_default()
            }
        }
    }
}

/// The field for a person.
fn label(field: Field, entry: Option<&str>) -> String {
    let name = field.as_str_name().to_ascii_lowercase().replace('_', " ");
    match entry {
        None => name,
        Some(entry) => format!("{name} {entry:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_unless_it_removes_first() {
        let mut owners = Owners::default();
        let mut claim = |entry, plugin| owners.claim("c", Field::Env, entry, plugin);
        claim(Some("A"), "00-a").unwrap();
        claim(Some("B"), "10-b").unwrap();
        let error = claim(Some("A"), "10-b").unwrap_err().to_string();
        for part in ["00-a", "10-b", "env \"A\"", "container c"] {
            assert!(error.contains(part), "{error}");
        }
        owners.clear("c", Field::Env, Some("A"), "10-b");
        assert_eq!(owners.of("c", Field::Env, Some("A")), None);
        let error = owners
            .claim("c", Field::Env, Some("A"), "20-c")
            .unwrap_err();
        assert!(error.to_string().contains("10-b"), "{error}");
        owners.claim("c", Field::Env, Some("A"), "10-b").unwrap();
        assert_eq!(owners.of("c", Field::Env, Some("A")), Some("10-b"));
        assert_eq!(owners.of("d", Field::Env, Some("A")), None);
        owners.claim("c", Field::Args, None, "00-a").unwrap();
        assert!(
            owners.claim("c", Field::Args, None, "00-a").is_err(),
            "twice"
        );
        owners.share("c", Field::OciHooks, "00-a");
        owners.share("c", Field::OciHooks, "10-b");
        assert_eq!(owners.of("c", Field::OciHooks, None), Some("00-a,10-b"));
        assert_eq!(owners.all_of("c", Field::Env).len(), 2);
    }
}
