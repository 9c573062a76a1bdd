{{/* Name of the release's objects; short, since pods of a StatefulSet add to it. */}}
{{- define "kvatlas.fullname" -}}
{{- if contains "kvatlas" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-kvatlas" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Arguments: (dict "root" $ "part" NAME) */}}
{{- define "kvatlas.selector" -}}
app.kubernetes.io/name: kvatlas
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "kvatlas.labels" -}}
{{ include "kvatlas.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* One part's settings file: what the values say, under what the chart fixes. */}}
{{- define "kvatlas.settings" -}}
{{- $kafka := deepCopy .root.Values.settings.kafka -}}
{{- $secret := include "kvatlas.kafkaSecret" . -}}
{{- $protocol := $kafka.security_protocol | default "PLAINTEXT" -}}
{{- if and $secret (not (hasPrefix "SASL_" $protocol)) -}}
{{- fail (printf "kafkaAuth names a Secret for the %s, but settings.kafka.security_protocol is %s: set SASL_SSL or SASL_PLAINTEXT" .part $protocol) -}}
{{- end -}}
{{- if and .root.Values.kafkaTls.secret (not (hasSuffix "SSL" $protocol)) -}}
{{- fail (printf "kafkaTls.secret is set, but settings.kafka.security_protocol is %s: set SSL or SASL_SSL" $protocol) -}}
{{- end -}}
{{- if $secret -}}
{{- $_ := set $kafka "sasl_password_file" "/etc/kvatlas/kafka-auth/password" -}}
{{- end -}}
{{- if .root.Values.kafkaTls.secret -}}
{{- $_ := set $kafka "ssl_cafile" "/etc/kvatlas/kafka-tls/ca.crt" -}}
{{- if .root.Values.kafkaTls.clientCertificate -}}
{{- $_ := set $kafka "ssl_certfile" "/etc/kvatlas/kafka-tls/tls.crt" -}}
{{- $_ := set $kafka "ssl_keyfile" "/etc/kvatlas/kafka-tls/tls.key" -}}
{{- end -}}
{{- end -}}
{{- $document := dict "kafka" $kafka "log" .root.Values.settings.log .part (mergeOverwrite (deepCopy (index .root.Values.settings .part)) .fixed) -}}
{{- if has .part (list "scorer" "picker") -}}
{{- $_ := set $document "tokenizer" .root.Values.settings.tokenizer -}}
{{- end -}}
{{- if eq .part "picker" -}}
{{- $_ := set $document "scorer" (merge (dict "outcome_delay_ms" 0) (deepCopy .root.Values.settings.scorer)) -}}
{{- end -}}
{{- toToml $document -}}
{{- end -}}

{{- define "kvatlas.kafkaSecret" -}}
{{- index .root.Values.kafkaAuth (printf "%sSecret" .part) | default .root.Values.kafkaAuth.secret -}}
{{- end -}}

{{- define "kvatlas.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* What the container of every part has. Arguments: (dict "root" $ "part" NAME "values" VALUES) */}}
{{- define "kvatlas.container" -}}
image: "{{ .root.Values.image.repository }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args: [{{ .part }}, --config, /etc/kvatlas/settings/kvatlas.toml{{ if eq .part "worker" }}, --no-supervise{{ end }}]
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
startupProbe:
  httpGet: {path: /healthz, port: telemetry}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: telemetry}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: telemetry}
  periodSeconds: 3
  timeoutSeconds: 3
resources:
  {{- toYaml .values.resources | nindent 2 }}
{{- end -}}

{{- define "kvatlas.env" -}}
{{- with include "kvatlas.kafkaSecret" . }}
- name: KVATLAS_KAFKA_SASL_USERNAME
  valueFrom: {secretKeyRef: {name: {{ . }}, key: username}}
{{- end }}
{{- end -}}

{{- define "kvatlas.mounts" -}}
- {name: settings, mountPath: /etc/kvatlas/settings, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if include "kvatlas.kafkaSecret" . }}
- {name: kafka-auth, mountPath: /etc/kvatlas/kafka-auth, readOnly: true}
{{- end }}
{{- if .root.Values.kafkaTls.secret }}
- {name: kafka-tls, mountPath: /etc/kvatlas/kafka-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "kvatlas.volumes" -}}
- name: settings
  configMap: {name: {{ include "kvatlas.fullname" .root }}-{{ .part }}}
- name: tmp
  emptyDir: {}
{{- with include "kvatlas.kafkaSecret" . }}
- name: kafka-auth
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .root.Values.kafkaTls.secret }}
- name: kafka-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{/* What the pod of every part has. */}}
{{- define "kvatlas.pod" -}}
# Kubernetes would add KVATLAS_..._PORT and the like for our Services, which are no settings: the services refuse them.
enableServiceLinks: false
securityContext:
  {{- include "kvatlas.podSecurity" . | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Whether the bridge asks the Kubernetes API for the engines' pods. */}}
{{- define "kvatlas.watches" -}}
{{- and (not (empty .Values.engines.selector)) (eq .Values.engines.discovery "kubernetes") -}}
{{- end -}}

{{- define "kvatlas.account" -}}
{{- .Values.serviceAccount.name | default (ternary (include "kvatlas.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "kvatlas.bridgeAccount" -}}
{{- .Values.serviceAccount.bridgeName | default (ternary (printf "%s-bridge" (include "kvatlas.fullname" .)) "default" .Values.serviceAccount.create) -}}
{{- end -}}
