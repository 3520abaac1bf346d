{{- define "finetune.name" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) }}
{{- if gt (len $name) 63 }}
{{- fail (printf "the release is called %s, and its Service would be %s: more than the 63 characters that Kubernetes takes. Install it under a shorter name." .Release.Name $name) }}
{{- end }}
{{- $name -}}
{{- end }}

{{/* Objects without a namespace are named after it, so that two releases do not meet. */}}
{{- define "finetune.clusterName" -}}
{{ include "finetune.name" . }}-{{ .Release.Namespace }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/part-of: finetune
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of the children that the operator makes, and of their pods. */}}
{{- define "finetune.childSelector" -}}
app.kubernetes.io/managed-by: finetune-operator
{{- end }}
