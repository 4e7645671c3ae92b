{{- define "sidecache.selector" -}}
app.kubernetes.io/name: sidecache
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sidecache.labels" -}}
{{ include "sidecache.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sidecache.security" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "sidecache.probes" -}}
startupProbe:
  httpGet:
    path: /readyz
    port: probes
  periodSeconds: 1
  failureThreshold: 30
livenessProbe:
  httpGet:
    path: /livez
    port: probes
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
