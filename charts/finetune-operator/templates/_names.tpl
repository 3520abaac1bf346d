{{- define "finetune.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
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
