//! What several plugins wish, as one wish.

use std::collections::BTreeMap;

use slipway_proto::nri::{
    Container, ContainerAdjustment, ContainerUpdate, Field, KeyValue, LinuxContainer,
    LinuxContainerAdjustment, LinuxContainerUpdate, LinuxDevice, LinuxNamespace, LinuxResources,
    Mount,
};

use crate::error::NriError;
use crate::name::{is_removal, removal};
use crate::owners::Owners;
use crate::resources;

/// Entries that are named, and that may say that the one of that name is to be removed.
trait Named: Clone {
    const FIELD: Field;
    fn key(&self) -> &str;
    fn removing(key: &str) -> Self;
}

impl Named for Mount {
    const FIELD: Field = Field::Mounts;

    fn key(&self) -> &str {
        &self.destination
    }

    fn removing(key: &str) -> Self {
        Self {
            destination: removal(key),
            ..Self::default()
        }
    }
}

impl Named for KeyValue {
    const FIELD: Field = Field::Env;

    fn key(&self) -> &str {
        &self.key
    }

    fn removing(key: &str) -> Self {
        Self {
            key: removal(key),
            value: String::new(),
        }
    }
}

impl Named for LinuxDevice {
    const FIELD: Field = Field::Devices;

    fn key(&self) -> &str {
        &self.path
    }

    fn removing(key: &str) -> Self {
        Self {
            path: removal(key),
            ..Self::default()
        }
    }
}

impl Named for LinuxNamespace {
    const FIELD: Field = Field::Namespace;

    fn key(&self) -> &str {
        &self.r#type
    }

    fn removing(key: &str) -> Self {
        Self {
            r#type: removal(key),
            path: String::new(),
        }
    }
}

/// The adjustments of a container that is being created.
#[derive(Debug)]
pub struct Creation {
    /// As the next plugin sees it: with what those before have changed.
    pub container: Container,
    /// All changes.
    pub adjust: ContainerAdjustment,
    /// Changes of other containers.
    pub updates: Updates,
    /// Who made them.
    pub owners: Owners,
}

impl Creation {
    /// Of this container, unchanged.
    pub fn new(container: Container) -> Self {
        Self {
            updates: Updates::default(),
            adjust: ContainerAdjustment::default(),
            owners: Owners::default(),
            container,
        }
    }

    /// Takes over what a plugin wishes for the container.
    ///
    /// # Errors
    /// [`NriError::Conflict`].
    pub fn adjust(&mut self, wish: ContainerAdjustment, plugin: &str) -> Result<(), NriError> {
        let id = self.container.id.clone();
        let by = Plugin {
            container: &id,
            name: plugin,
        };
        let (own, owners, all) = (&mut self.container, &mut self.owners, &mut self.adjust);
        by.map(
            Field::Annotations,
            wish.annotations,
            &mut all.annotations,
            &mut own.annotations,
            owners,
        )?;
        by.list(wish.mounts, &mut all.mounts, &mut own.mounts, owners)?;
        by.env(wish.env, &mut all.env, &mut own.env, owners)?;
        by.args(wish.args, &mut all.args, &mut own.args, owners)?;
        if let Some(hooks) = wish.hooks {
            let mut any = false;
            let to = all.hooks.get_or_insert_default();
            let own = own.hooks.get_or_insert_default();
            for (from, to, own) in [
                (hooks.prestart, &mut to.prestart, &mut own.prestart),
                (
                    hooks.create_runtime,
                    &mut to.create_runtime,
                    &mut own.create_runtime,
                ),
                (
                    hooks.create_container,
                    &mut to.create_container,
                    &mut own.create_container,
                ),
                (
                    hooks.start_container,
                    &mut to.start_container,
                    &mut own.start_container,
                ),
                (hooks.poststart, &mut to.poststart, &mut own.poststart),
                (hooks.poststop, &mut to.poststop, &mut own.poststop),
            ] {
                any |= !from.is_empty();
                own.extend_from_slice(&from);
                to.extend(from);
            }
            if any {
                owners.share(&id, Field::OciHooks, plugin);
            }
        }
        for limit in wish.rlimits {
            owners.claim(&id, Field::Rlimits, Some(&limit.r#type), plugin)?;
            own.rlimits.retain(|old| old.r#type != limit.r#type);
            own.rlimits.push(limit.clone());
            all.rlimits.push(limit);
        }
        // Names of devices; the container never shows them, as what they stand for is found out later.
        for device in wish.cdi_devices {
            owners.claim(&id, Field::CdiDevices, Some(&device.name), plugin)?;
            all.cdi_devices.push(device);
        }
        match wish.linux {
            Some(linux) => by.linux(
                linux,
                all.linux.get_or_insert_default(),
                own.linux.get_or_insert_default(),
                owners,
            ),
            None => Ok(()),
        }
    }

    /// Takes over what a plugin wishes for other containers.
    ///
    /// # Errors
    /// [`NriError::Conflict`]; [`NriError::Senseless`] for an update of the container itself.
    pub fn update(&mut self, updates: Vec<ContainerUpdate>, plugin: &str) -> Result<(), NriError> {
        for update in updates {
            if update.container_id == self.container.id {
                return Err(NriError::Senseless {
                    plugin: plugin.to_owned(),
                    what: format!(
                        "asks for an update of container {}, which is being created; adjust it",
                        update.container_id
                    ),
                });
            }
            self.updates.add(update, plugin, &mut self.owners)?;
        }
        Ok(())
    }
}

/// A plugin at work on a container.
struct Plugin<'a> {
    container: &'a str,
    name: &'a str,
}

impl Plugin<'_> {
    fn map<V: Clone + Default>(
        &self,
        field: Field,
        wish: BTreeMap<String, V>,
        all: &mut BTreeMap<String, V>,
        own: &mut BTreeMap<String, V>,
        owners: &mut Owners,
    ) -> Result<(), NriError> {
        for key in wish.keys().filter_map(|key| is_removal(key)) {
            all.remove(key);
            own.remove(key);
            all.insert(removal(key), V::default());
            owners.clear(self.container, field, Some(key), self.name);
        }
        for (key, value) in wish {
            if is_removal(&key).is_none() {
                owners.claim(self.container, field, Some(&key), self.name)?;
                own.insert(key.clone(), value.clone());
                all.insert(key, value);
            }
        }
        Ok(())
    }

    /// Splits off the removals, and forgets what they name.
    fn remove<T: Named>(
        &self,
        wish: Vec<T>,
        all: &mut Vec<T>,
        owners: &mut Owners,
    ) -> (Vec<String>, Vec<T>) {
        let (removed, added): (Vec<T>, Vec<T>) = wish
            .into_iter()
            .partition(|entry| is_removal(entry.key()).is_some());
        let keys: Vec<String> = removed
            .iter()
            .filter_map(|entry| is_removal(entry.key()).map(str::to_owned))
            .collect();
        for key in &keys {
            let marker = T::removing(key);
            all.retain(|entry| entry.key() != key && entry.key() != marker.key());
            all.push(marker);
            owners.clear(self.container, T::FIELD, Some(key), self.name);
        }
        (keys, added)
    }

    fn list<T: Named>(
        &self,
        wish: Vec<T>,
        all: &mut Vec<T>,
        own: &mut Vec<T>,
        owners: &mut Owners,
    ) -> Result<(), NriError> {
        let (removed, added) = self.remove(wish, all, owners);
        own.retain(|entry| !removed.iter().any(|key| key == entry.key()));
        for entry in added {
            owners.claim(self.container, T::FIELD, Some(entry.key()), self.name)?;
            own.retain(|old| old.key() != entry.key());
            own.push(entry.clone());
            all.push(entry);
        }
        Ok(())
    }

    fn env(
        &self,
        wish: Vec<KeyValue>,
        all: &mut Vec<KeyValue>,
        own: &mut Vec<String>,
        owners: &mut Owners,
    ) -> Result<(), NriError> {
        let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
        let (removed, added) = self.remove(wish, all, owners);
        own.retain(|entry| !removed.contains(&name(entry)));
        for entry in added {
            owners.claim(self.container, Field::Env, Some(&entry.key), self.name)?;
            own.retain(|old| name(old) != entry.key);
            own.push(format!("{}={}", entry.key, entry.value));
            all.push(entry);
        }
        Ok(())
    }

    fn args(
        &self,
        mut wish: Vec<String>,
        all: &mut Vec<String>,
        own: &mut Vec<String>,
        owners: &mut Owners,
    ) -> Result<(), NriError> {
        if wish.is_empty() {
            return Ok(());
        }
        // An empty command can't be meant, so it says that another plugin's is to be replaced.
        if wish.first().is_some_and(String::is_empty) {
            owners.clear(self.container, Field::Args, None, self.name);
            wish.remove(0);
        }
        owners.claim(self.container, Field::Args, None, self.name)?;
        own.clone_from(&wish);
        *all = wish;
        Ok(())
    }

    fn linux(
        &self,
        wish: LinuxContainerAdjustment,
        all: &mut LinuxContainerAdjustment,
        own: &mut LinuxContainer,
        owners: &mut Owners,
    ) -> Result<(), NriError> {
        let claim =
            |owners: &mut Owners, field| owners.claim(self.container, field, None, self.name);
        self.list(wish.devices, &mut all.devices, &mut own.devices, owners)?;
        self.list(
            wish.namespaces,
            &mut all.namespaces,
            &mut own.namespaces,
            owners,
        )?;
        self.map(
            Field::Sysctl,
            wish.sysctl,
            &mut all.sysctl,
            &mut own.sysctl,
            owners,
        )?;
        let (devices, own_devices) = (&mut all.net_devices, &mut own.net_devices);
        self.map(
            Field::LinuxNetDevices,
            wish.net_devices,
            devices,
            own_devices,
            owners,
        )?;
        if let Some(change) = wish.resources {
            let (id, name) = (self.container, self.name);
            resources::merge(
                all.resources.get_or_insert_default(),
                &change,
                owners,
                id,
                name,
            )?;
            // Claimed already: nobody else's.
            let own = own.resources.get_or_insert_default();
            resources::merge(own, &change, &mut Owners::default(), id, name)?;
        }
        if !wish.cgroups_path.is_empty() {
            claim(owners, Field::CgroupsPath)?;
            own.cgroups_path.clone_from(&wish.cgroups_path);
            all.cgroups_path = wish.cgroups_path;
        }
        if wish.oom_score_adj.is_some() {
            claim(owners, Field::OomScoreAdj)?;
            own.oom_score_adj = wish.oom_score_adj;
            all.oom_score_adj = wish.oom_score_adj;
        }
        if wish.io_priority.is_some() {
            claim(owners, Field::IoPriority)?;
            own.io_priority = wish.io_priority;
            all.io_priority = wish.io_priority;
        }
        if wish.seccomp_policy.is_some() {
            claim(owners, Field::SeccompPolicy)?;
            own.seccomp_policy.clone_from(&wish.seccomp_policy);
            all.seccomp_policy = wish.seccomp_policy;
        }
        if wish.scheduler.is_some() {
            claim(owners, Field::LinuxSched)?;
            own.scheduler.clone_from(&wish.scheduler);
            all.scheduler = wish.scheduler;
        }
        if wish.memory_policy.is_some() {
            claim(owners, Field::MemoryPolicy)?;
            all.memory_policy = wish.memory_policy;
        }
        if let Some(rdt) = wish.rdt {
            let to = all.rdt.get_or_insert_default();
            if rdt.remove {
                for field in [
                    Field::RdtClosId,
                    Field::RdtSchemata,
                    Field::RdtEnableMonitoring,
                ] {
                    owners.clear(self.container, field, None, self.name);
                }
                *to = slipway_proto::nri::LinuxRdt {
                    remove: true,
                    ..Default::default()
                };
            }
            if rdt.clos_id.is_some() {
                claim(owners, Field::RdtClosId)?;
                (to.clos_id, to.remove) = (rdt.clos_id, false);
            }
            if rdt.schemata.is_some() {
                claim(owners, Field::RdtSchemata)?;
                (to.schemata, to.remove) = (rdt.schemata, false);
            }
            if rdt.enable_monitoring.is_some() {
                claim(owners, Field::RdtEnableMonitoring)?;
                (to.enable_monitoring, to.remove) = (rdt.enable_monitoring, false);
            }
        }
        Ok(())
    }
}

/// Changes of the limits of containers, one entry for each.
#[derive(Debug, Default)]
pub struct Updates(Vec<ContainerUpdate>);

impl Updates {
    /// With an update that nobody's plugin asked for.
    pub fn starting_with(id: &str, resources: LinuxResources) -> Self {
        Self(vec![ContainerUpdate {
            container_id: id.to_owned(),
            linux: Some(LinuxContainerUpdate {
                resources: Some(resources),
            }),
            ignore_failure: false,
        }])
    }

    /// The changes of one container.
    pub fn of(&self, id: &str) -> Option<&LinuxResources> {
        let update = self.0.iter().find(|update| update.container_id == id)?;
        update.linux.as_ref()?.resources.as_ref()
    }

    /// Takes over one. Of one whose failure does not matter, a conflict does not matter either: it is left out.
    ///
    /// # Errors
    /// [`NriError::Conflict`].
    pub fn add(
        &mut self,
        update: ContainerUpdate,
        plugin: &str,
        owners: &mut Owners,
    ) -> Result<(), NriError> {
        let id = update.container_id.clone();
        let change = update.linux.and_then(|l| l.resources).unwrap_or_default();
        let at = self.0.iter().position(|other| other.container_id == id);
        let mut all = at
            .and_then(|at| self.0.get(at)?.linux.as_ref()?.resources.clone())
            .unwrap_or_default();
        let mut claims = owners.clone();
        match resources::merge(&mut all, &change, &mut claims, &id, plugin) {
            Ok(()) => *owners = claims,
            Err(error) if update.ignore_failure => {
                tracing::warn!(plugin, %error, "an update is left out");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let linux = Some(LinuxContainerUpdate {
            resources: Some(all),
        });
        match at.and_then(|at| self.0.get_mut(at)) {
            Some(old) => {
                old.ignore_failure &= update.ignore_failure;
                old.linux = linux;
            }
            None => self.0.push(ContainerUpdate {
                container_id: id,
                linux,
                ignore_failure: update.ignore_failure,
            }),
        }
        Ok(())
    }

    /// All of them.
    pub fn list(&self) -> &[ContainerUpdate] {
        &self.0
    }

    /// Takes the changes of one container out.
    pub fn take(&mut self, id: &str) -> Option<LinuxResources> {
        let at = self.0.iter().position(|update| update.container_id == id)?;
        self.0.remove(at).linux?.resources
    }

    /// All of them.
    pub fn into_list(self) -> Vec<ContainerUpdate> {
        self.0
    }
}

#[cfg(test)]
mod tests;
