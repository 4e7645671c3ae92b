{{- /*
A native sidecar container for a Pod of your own chart (Kubernetes 1.29 and later). Make this chart a dependency of yours,
and add, before every init container that calls the API:

      initContainers:
        {{- include "sidecache.sidecar" (dict "image" "registry.example/sidecache:0.1.0" "configMap" "my-sidecache") | nindent 8 }}
      volumes:
        {{- include "sidecache.volume" (dict "configMap" "my-sidecache") | nindent 8 }}

The ConfigMap has the key config.toml, whose [probes] listen on port 18082.
*/ -}}
{{- define "sidecache.sidecar" -}}
- name: sidecache
  image: {{ .image | quote }}
  restartPolicy: Always
  args: ["--config", "/etc/sidecache/config.toml"]
  ports:
    - name: probes
      containerPort: 18082
      protocol: TCP
  {{- include "sidecache.probes" . | nindent 2 }}
  resources:
    requests:
      cpu: 50m
      memory: 96Mi
    limits:
      memory: 160Mi
  securityContext:
    {{- include "sidecache.security" . | nindent 4 }}
  volumeMounts:
    - name: sidecache-config
      mountPath: /etc/sidecache
      readOnly: true
{{- end }}

{{- define "sidecache.volume" -}}
- name: sidecache-config
  configMap:
    name: {{ .configMap | quote }}
{{- end }}
