{{/* Names. The agent's are fixed: the plugin and istiod know them. */}}
{{- define "ztun.proxy" -}}{{ .Values.resourceName | default "ztunnel" }}{{- end }}
{{- define "ztun.agent" -}}istio-cni-node{{- end }}
{{- define "ztun.agentAccount" -}}istio-cni{{- end }}

{{/* Whether objects with ("namespace") or without ("cluster") a namespace are wanted: list . SCOPE */}}
{{- define "ztun.wants" -}}
{{- $scope := (index . 0).Values.resourceScope -}}
{{- if or (eq $scope "all") (eq $scope (index . 1)) }}true{{ end -}}
{{- end }}

{{/* Labels of every object. */}}
{{- define "ztun.labels" -}}
{{- $own := dict
    "app.kubernetes.io/managed-by" .Release.Service
    "app.kubernetes.io/instance" .Release.Name
    "app.kubernetes.io/part-of" "ztun"
    "app.kubernetes.io/version" (include "ztun.version" .)
    "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version)
-}}
{{- toYaml (mergeOverwrite $own (deepCopy .Values.labels)) }}
{{- end }}

{{/* A label's value of up to 63 characters that ends well. */}}
{{- define "ztun.version" -}}
{{- regexReplaceAll "[^-A-Za-z0-9_.]" (include "ztun.tag" .) "_" | trunc 63 | trimAll "-_." -}}
{{- end }}

{{- define "ztun.tag" -}}
{{- .Values.tag | default .Values.global.tag | default .Chart.AppVersion -}}
{{- end }}

{{- define "ztun.image" -}}
{{- $image := .Values.image -}}
{{- if not (contains "/" $image) -}}
{{- $hub := required "hub: say where the image is, as HOST/PATH, or give its whole name as image" (.Values.hub | default .Values.global.hub) -}}
{{- $image = printf "%s/%s" $hub $image -}}
{{- end -}}
{{- /* A digest or a tag that is there already stays. */ -}}
{{- if or (contains "@" $image) (contains ":" (base $image)) -}}
{{- $image -}}
{{- else -}}
{{- printf "%s:%s" $image (include "ztun.tag" .) -}}
{{- end -}}
{{- end }}

{{/* What both containers say of the image. */}}
{{- define "ztun.container" -}}
image: {{ include "ztun.image" . | quote }}
{{- with .Values.imagePullPolicy | default .Values.global.imagePullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "ztun.pullSecrets" -}}
{{- with .Values.imagePullSecrets | default .Values.global.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What differs between distributions: the values, else the platform's file, else what most have. */}}
{{- define "ztun.platform" -}}
{{- $p := dict -}}
{{- with .Values.global.platform -}}
{{- $p = $.Files.Get (printf "files/platform-%s.yaml" .) | fromYaml -}}
{{- end -}}
{{- $cni := .Values.cni -}}
{{- $usual := dict "cniBinDir" "/opt/cni/bin" "cniConfDir" "/etc/cni/net.d" "cniNetnsDir" "/var/run/netns"
    "cniConfFileName" "" "chained" true "provider" "default" "seLinuxType" "" "openshift" false "resourceQuotas" false -}}
{{- $said := dict -}}
{{- range $name := list "cniBinDir" "cniConfDir" "cniNetnsDir" "cniConfFileName" "provider" -}}
{{- with get $cni $name }}{{ $_ := set $said $name . }}{{ end -}}
{{- end -}}
{{- if kindIs "bool" $cni.chained }}{{ $_ := set $said "chained" $cni.chained }}{{ end -}}
{{- if kindIs "bool" .Values.resourceQuotas.enabled }}{{ $_ := set $said "resourceQuotas" .Values.resourceQuotas.enabled }}{{ end -}}
{{- toYaml (mergeOverwrite $usual $p $said) -}}
{{- end }}

{{/* SELinux options: list PLATFORM OPTIONS */}}
{{- define "ztun.seLinuxOptions" -}}
{{- $platform := index . 0 -}}
{{- $options := deepCopy (index . 1) -}}
{{- if and $platform.seLinuxType (not $options.type) }}{{ $_ := set $options "type" $platform.seLinuxType }}{{ end -}}
{{- with $options }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
Environment variables, each once: dict "values" (names and values), "fields" (names and paths of the downward
API), "resources" (names and resources of the container). Values win.
*/}}
{{- define "ztun.env" -}}
{{- $values := .values -}}
{{- range $name, $path := .fields }}
{{- if not (hasKey $values $name) }}
- name: {{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $path }}
{{- end }}
{{- end }}
{{- range $name, $resource := .resources }}
{{- if not (hasKey $values $name) }}
- name: {{ $name }}
  valueFrom:
    resourceFieldRef:
      resource: {{ $resource }}
      divisor: "1"
{{- end }}
{{- end }}
{{- range $name, $value := $values }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "ztun.istiod" -}}
istiod{{ with .Values.revision }}-{{ . }}{{ end }}.{{ .Values.istioNamespace }}.svc:15012
{{- end }}

{{/* The proxy's metrics port, which the mesh configuration can move. */}}
{{- define "ztun.statsPort" -}}
{{- .Values.meshConfig.defaultConfig.statsPort | default 15020 | int -}}
{{- end }}

{{- define "ztun.meshConfig" -}}
{{- toYaml .Values.meshConfig -}}
{{- end }}

{{/* The agent's settings, each a string: list . PLATFORM */}}
{{- define "ztun.agentConfig" -}}
{{- $top := index . 0 -}}
{{- $platform := index . 1 -}}
{{- $cni := $top.Values.cni -}}
{{- $config := dict
    "CURRENT_AGENT_VERSION" (include "ztun.tag" $top)
    "AMBIENT_ENABLED" "true"
    "AMBIENT_DNS_CAPTURE" ($cni.ambient.dnsCapture | toString)
    "EXCLUDE_NAMESPACES" (join "," $cni.excludeNamespaces)
    "CHAINED_CNI_PLUGIN" ($platform.chained | toString)
    "ISTIO_OWNED_CNI_CONFIG" ($cni.istioOwnedCNIConfig | toString)
-}}
{{- with $cni.ambient.enablementSelectors }}{{ $_ := set $config "AMBIENT_ENABLEMENT_SELECTOR" (toYaml .) }}{{ end -}}
{{- with $platform.cniConfFileName }}{{ $_ := set $config "CNI_CONF_NAME" . }}{{ end -}}
{{- if $cni.istioOwnedCNIConfig }}{{ $_ := set $config "ISTIO_OWNED_CNI_CONFIG_FILENAME" $cni.istioOwnedCNIConfigFileName }}{{ end -}}
{{- with $cni.logging.level }}{{ $_ := set $config "LOG_LEVEL" . }}{{ end -}}
{{- if kindIs "bool" $cni.logAsJson | ternary $cni.logAsJson $top.Values.logAsJson }}{{ $_ := set $config "LOG_FORMAT" "json" }}{{ end -}}
{{- toYaml $config -}}
{{- end }}
