{{/* Names. 40 characters leave room for those of the pools. */}}
{{- define "baton.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* What selects pods never changes with an update: no version in it. Takes (root, component). */}}
{{- define "baton.release" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "baton.selector" -}}
{{ include "baton.release" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "baton.workerSelector" -}}
{{ include "baton.release" . }}
baton-tier: worker
{{- end }}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
{{- with index . 0 }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
{{- end }}

{{/* Takes (root, which image). */}}
{{- define "baton.image" -}}
{{- $image := index (index . 0).Values.images (index . 1) -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* A pool with what it takes from the defaults, as JSON. Takes (root, pool). */}}
{{- define "baton.pool" -}}
{{- mergeOverwrite (deepCopy (index . 0).Values.workerDefaults) (deepCopy (index . 1 | default dict)) | toJson -}}
{{- end }}

{{/* Config files. Where a process listens and whom it asks is said by its environment, which comes before the file. */}}
{{- define "baton.sharedSettings" -}}
{{- dict "model" .Values.model "index" (dict "namespace" (printf "%s.%s" .Release.Namespace (include "baton.fullname" .))) | toJson -}}
{{- end }}

{{- define "baton.routerSettings" -}}
{{- mergeOverwrite (include "baton.sharedSettings" . | fromJson) .Values.router.settings | toYaml -}}
{{- end }}

{{/* Takes (root, merged pool). */}}
{{- define "baton.workerSettings" -}}
{{- $pool := index . 1 -}}
{{- mergeOverwrite (include "baton.sharedSettings" (index . 0) | fromJson) (dict "roles" $pool.roles) $pool.settings | toYaml -}}
{{- end }}

{{- define "baton.modelsClaim" -}}
{{- .Values.models.claim | default (ternary (printf "%s-models" (include "baton.fullname" .)) "" (not (empty .Values.models.createClaim))) -}}
{{- end }}

{{/* The Secret with a role's certificate; empty without TLS. Takes (root, "router" or "worker"). */}}
{{- define "baton.tlsSecret" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.tls -}}
{{- $made := or .ownAuthority.enabled .certManager.enabled -}}
{{- $given := or .secrets.router .secrets.worker -}}
{{- if or (and $given $made) (and .ownAuthority.enabled .certManager.enabled) }}
{{- fail "tls.secrets, tls.ownAuthority, tls.certManager: only one of these" }}
{{- end -}}
{{- if and $given (not (and .secrets.router .secrets.worker)) }}
{{- fail "tls.secrets: router and worker need one each" }}
{{- end -}}
{{- ternary (printf "%s-tls-%s" (include "baton.fullname" $root) (index $ 1)) (get .secrets (index $ 1)) $made -}}
{{- end -}}
{{- end }}

{{/* Certificates are for router.DOMAIN and worker.DOMAIN: those of another release are of no use in this one. */}}
{{- define "baton.tlsDomain" -}}
{{- .Values.tls.domain | default (printf "%s.%s.svc" (include "baton.fullname" .) .Release.Namespace) -}}
{{- end }}

{{/* These three take (root, role) and are empty without TLS. */}}
{{- define "baton.tlsEnv" -}}
{{- if include "baton.tlsSecret" . }}
- name: BATON_TLS__CERT
  value: /etc/baton-tls/tls.crt
- name: BATON_TLS__KEY
  value: /etc/baton-tls/tls.key
- name: BATON_TLS__CA
  value: /etc/baton-tls/ca.crt
- name: BATON_TLS__DOMAIN
  value: {{ include "baton.tlsDomain" (index . 0) }}
{{- end }}
{{- end }}

{{- define "baton.tlsMount" -}}
{{- if include "baton.tlsSecret" . }}
- name: tls
  mountPath: /etc/baton-tls
  readOnly: true
{{- end }}
{{- end }}

{{- define "baton.tlsVolume" -}}
{{- with include "baton.tlsSecret" . }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{/* What router and workers share. */}}
{{- define "baton.env" -}}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: /models
- name: BATON_LOG_LEVEL
  value: {{ .Values.log.level }}
- name: BATON_LOG_FORMAT
  value: {{ .Values.log.format }}
- name: BATON_INDEX__REDIS_URL
  {{- if .Values.redis.embedded }}
  value: redis://{{ include "baton.fullname" . }}-redis:6379/0
  {{- else }}
  valueFrom:
    secretKeyRef:
      name: {{ required "redis.external.urlSecret: needed without the embedded Redis" .Values.redis.external.urlSecret }}
      key: {{ .Values.redis.external.urlKey }}
  {{- end }}
{{- with .Values.models.hubTokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: HF_TOKEN
{{- end }}
{{- range $name, $value := .Values.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "baton.mounts" -}}
- name: config
  mountPath: /etc/baton
  readOnly: true
- name: models
  mountPath: /models
  readOnly: {{ .Values.models.readOnly }}
- name: tmp
  mountPath: /tmp
{{- end }}

{{/* Takes (root, name of the config file without its ending). */}}
{{- define "baton.volumes" -}}
{{- $root := index . 0 -}}
- name: config
  configMap:
    name: {{ include "baton.fullname" $root }}
    items:
      - key: {{ index . 1 }}.yaml
        path: {{ index . 1 }}.yaml
- name: models
  {{- with include "baton.modelsClaim" $root }}
  persistentVolumeClaim:
    claimName: {{ . }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $root.Values.models.sizeLimit }}
  {{- end }}
- name: tmp
  emptyDir: {}
{{- end }}

{{/* Serving takes no identity: nothing of it speaks to the Kubernetes API. */}}
{{- define "baton.noIdentity" -}}
serviceAccountName: {{ include "baton.fullname" . }}
automountServiceAccountToken: false
{{- end }}

{{/* The restricted Pod Security level. Takes (root, uid). */}}
{{- define "baton.podSecurity" -}}
# Kubernetes would announce a Service called baton as BATON_PORT=tcp://..., which is a setting of ours.
enableServiceLinks: false
{{- with (index . 0).Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ index . 1 }}
  runAsGroup: {{ index . 1 }}
  fsGroup: {{ index . 1 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "baton.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Annotations of what runs before an installation and every upgrade, and is gone after it. Takes the weight. */}}
{{- define "baton.hook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* Where the pods may run. Takes (root, component, settings, whom to be near as a node label). */}}
{{- define "baton.placement" -}}
{{- $settings := index . 2 -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "baton.selector" . | nindent 8 }}
{{- if $settings.affinity }}
affinity:
  {{- toYaml $settings.affinity | nindent 2 }}
{{- else if index . 3 }}
affinity:
  podAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: {{ index . 3 }}
          labelSelector:
            matchLabels:
              {{- include "baton.workerSelector" (index . 0) | nindent 14 }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" "priorityClassName" "runtimeClassName" }}
{{- with get $settings $field }}
{{ $field }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Ports: what is listened on, in one place. */}}
{{- define "baton.ports" -}}
{{- dict "http" 8000 "routerGrpc" 50050 "workerGrpc" 50051 "health" 50053 "metrics" 9100 "redis" 6379 "kv" .Values.networkPolicy.kvPort | toJson -}}
{{- end }}

{{/* Whether no decode worker may be there on purpose: all pools with that role scale to zero. */}}
{{- define "baton.mayBeEmpty" -}}
{{- $root := . -}}
{{- $scaled := false -}}
{{- $kept := false -}}
{{- range $name, $given := .Values.workers -}}
{{- $pool := include "baton.pool" (list $root $given) | fromJson -}}
{{- if has "decode" $pool.roles -}}
{{- $toZero := and $pool.autoscaling (not $pool.autoscaling.minReplicas) -}}
{{- $scaled = or $scaled $toZero -}}
{{- $kept = or $kept (not $toZero) -}}
{{- end -}}
{{- end -}}
{{- if and $scaled (not $kept) -}}yes{{- end -}}
{{- end }}

{{- define "baton.usesHub" -}}
{{- if not (or (eq .Values.model.model "demo") (hasPrefix "/" .Values.model.model)) -}}yes{{- end -}}
{{- end }}

{{/* What network policies allow. */}}
{{- define "baton.kvPorts" -}}
- port: {{ .Values.networkPolicy.kvPort }}
- port: {{ .Values.networkPolicy.ucxPorts.first }}
  endPort: {{ .Values.networkPolicy.ucxPorts.last }}
{{- end }}

{{- define "baton.commonEgress" -}}
- ports: # DNS
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- if .Values.redis.embedded }}
- to:
    - podSelector:
        matchLabels:
          {{- include "baton.selector" (list . "redis") | nindent 10 }}
  ports:
    - port: 6379
{{- else }}
- ports: # Redis, wherever it is
    {{- range .Values.redis.external.ports }}
    - port: {{ . }}
    {{- end }}
{{- end }}
{{- if include "baton.usesHub" . }}
- ports: # the model hub
    - port: 443
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}
