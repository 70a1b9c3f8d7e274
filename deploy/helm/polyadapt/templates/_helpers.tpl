{{- define "polyadapt.name" -}}
{{- .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "polyadapt.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "polyadapt.selector" -}}
app.kubernetes.io/name: {{ include "polyadapt.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "polyadapt.applySelector" -}}
app.kubernetes.io/name: {{ include "polyadapt.name" . }}-apply
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "polyadapt.labels" -}}
{{ include "polyadapt.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "polyadapt.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "polyadapt.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "polyadapt.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" (gt (int .Values.gpu.count) 0))) }}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}
{{- end }}

{{- /* What has to pass between the preStop hook and the last process: docs/deploy.md, "Drain". */}}
{{- define "polyadapt.leastGrace" -}}
{{- add (ceil .Values.drain.noticeSeconds) (ceil .Values.drain.graceSeconds) 20 }}
{{- end }}

{{- define "polyadapt.grace" -}}
{{- $least := include "polyadapt.leastGrace" . | int }}
{{- $given := .Values.terminationGracePeriodSeconds }}
{{- if kindIs "invalid" $given }}{{ $least }}
{{- else if lt (int $given) $least }}
{{- fail (printf "terminationGracePeriodSeconds is %d, expected at least %d: drain.noticeSeconds + drain.graceSeconds + 20; leave it null or shorten the drain" (int $given) $least) }}
{{- else }}{{ int $given }}
{{- end }}
{{- end }}

{{- define "polyadapt.replicas" -}}
{{- $many := or (gt (int .Values.replicas) 1) (ne .Values.autoscaling.kind "none") }}
{{- if and $many .Values.cache.existingClaim }}
{{- fail "cache.existingClaim is one volume for one replica; leave it empty, or set replicas to 1 and autoscaling.kind to none" }}
{{- end }}
{{- if and $many (not (and .Values.secret.keys.databaseUrl .Values.store.blobUrl)) }}
{{- fail "several replicas need one registry and one store of adapters: set secret.keys.databaseUrl and store.blobUrl" }}
{{- end }}
{{- int .Values.replicas }}
{{- end }}
