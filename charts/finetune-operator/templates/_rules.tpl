{{/* What the operator does in the namespaces whose jobs it looks after. No Secrets, no logs, no exec. */}}
{{- define "finetune.jobRules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
# Where OwnerReferencesPermissionEnforcement is on, only who may do this may own children with blockOwnerDeletion.
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
# Of use where KubeRay is installed.
- apiGroups: [ray.io]
  resources: [rayjobs]
  verbs: [get, list, watch, create, patch, delete]
# Why a queue holds a job back; of use where Kueue is installed.
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, update, delete]
# Why a pod waits stands in its events alone.
- apiGroups: [""]
  resources: [events]
  verbs: [list, create, patch]
{{- end }}

{{/* What has no namespace. */}}
{{- define "finetune.clusterRules" -}}
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
# When the definition comes, changes or goes.
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  resourceNames: [finetunejobs.finetune.dev]
  verbs: [list, watch]
{{- if .Values.settings.watchNamespaces }}
# One of the namespaces may be created later.
- apiGroups: [""]
  resources: [namespaces]
  verbs: [list, watch]
{{- end }}
{{- end }}

{{/* What the operator does in its own namespace. */}}
{{- define "finetune.ownRules" -}}
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [{{ include "finetune.name" . }}-tls]
  verbs: [get, update]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "finetune.name" . }}]
  verbs: [get, update]
{{- end }}
