{{/* The operator's settings file: the values, and what only the chart knows. */}}
{{- define "finetune.settings" -}}
{{- include "finetune.checkProxy" .Values.settings.pod.env }}
{{- $known := dict
  "namespace" .Release.Namespace
  "lease" (include "finetune.name" .)
  "httpPort" 8080
  "image" (dict "name" (.Values.settings.image.name | default (printf "finetune-trainer:%s" .Chart.AppVersion)))
  "progress" (dict
    "url" (printf "https://%s.%s.svc:10443" (include "finetune.name" .) .Release.Namespace)
    "port" 10443
    "secret" (printf "%s-tls" (include "finetune.name" .)))
}}
{{- mergeOverwrite (deepCopy .Values.settings) $known | toYaml }}
{{- end }}

{{/* Progress goes to a Service; a proxy outside the cluster does not know it. */}}
{{- define "finetune.checkProxy" -}}
{{- $proxies := list }}
{{- $exceptions := "" }}
{{- range $name, $value := . }}
{{- if has (upper $name) (list "HTTPS_PROXY" "ALL_PROXY") }}{{ $proxies = append $proxies $name }}{{ end }}
{{- if eq (upper $name) "NO_PROXY" }}{{ $exceptions = printf "%s,%s" $exceptions $value }}{{ end }}
{{- end }}
{{- if and $proxies (not (has ".svc" (splitList "," (nospace $exceptions)))) }}
{{- fail (printf "settings.pod.env sets %s, but NO_PROXY does not contain .svc: reports of progress would go to the proxy. Add .svc to settings.pod.env.NO_PROXY." (join ", " $proxies)) }}
{{- end }}
{{- end }}
