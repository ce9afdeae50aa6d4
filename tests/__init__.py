"""Tests, in the folders of the package; below, which one guards what users once met.

Nearly all were seen to fail on code that was broken where they look.

Numbers that were silently wrong

* A resumed training kept the old learning rate, decay, schedule or patience:
  modules/training/test_resuming.py::test_decay_and_betas_of_adam_are_those_given_now,
  cli/test_trainer_flags.py::test_another_rate_is_said_stored_and_used
* Terms of an earlier fit stayed in the loss:
  modules/training/test_own_parts.py::test_a_term_of_an_earlier_fit_is_gone
* One number meant two labels in one cohort; ignored numbers were not told:
  data/test_odd_files.py::test_mixed_codings_are_judged_case_by_case,
  data/test_odd_files.py::test_a_cavity_is_ignored_counted_and_shown
* Background other than 0, skull, label map as scan, scans that do not lie on each other:
  data/test_one_judge.py::test_a_background_that_is_not_0,
  data/test_one_judge.py::test_a_label_map_given_as_a_scan,
  data/test_one_judge.py::test_a_scan_with_skull_or_that_lies_elsewhere_is_refused,
  inference/test_refusals.py::test_scans_with_skull_or_background
* Headers in metres or microns, absurd voxels, grids larger than memory:
  data/test_one_judge.py::test_units_of_the_header_are_honoured,
  data/test_one_judge.py::test_absurd_voxels_stop_no_other_case,
  data/test_one_judge.py::test_no_grid_larger_than_memory_is_asked_for
* Visits of one patient in training and test:
  data/cohorts/test_public_cohorts.py::test_visits_of_a_patient_stay_together,
  data/cohorts/test_public_cohorts.py::test_names_that_tell_no_patient_are_remarked_upon
* One patient under two names; a result or a mask of the whole tumour for a label map:
  data/cohorts/test_inspection.py::test_scans_under_two_names_are_told,
  data/cohorts/test_inspection.py::test_a_mask_of_the_whole_tumour_among_label_maps_is_named,
  data/test_plausibility.py::test_a_result_of_this_package_in_the_place_of_a_label_is_told
* Arrays that were turned under their headers; T2 under the name of T1; thick slices:
  data/test_plausibility.py::test_arrays_that_were_turned_under_their_headers_are_told,
  data/test_plausibility.py::test_a_scan_whose_fluid_is_not_that_of_its_name_is_told,
  modules/test_foreign_checkpoints.py::test_voxels_of_another_size_than_in_training_are_told
* A plateau schedule followed Dice upside down, or failed without a validation:
  modules/training/test_optimization.py::test_the_rate_falls_when_the_metric_gets_no_better,
  modules/training/test_optimization.py::test_a_plateau_without_any_validation_is_one_sentence
* Lightning's load_from_checkpoint lost a part of the model:
  modules/test_damaged_checkpoints.py::test_lightnings_own_loading_gives_the_same_model
* Headers that do not say how a volume lies:
  data/test_one_judge.py::test_a_case_that_lost_its_orientation_is_refused_beside_others,
  data/test_one_judge.py::test_a_cohort_without_orientation_is_told
* Voxels read from inside the header:
  data/test_one_judge.py::test_voxels_never_begin_inside_the_header
* Averaged weights that reached no checkpoint:
  modules/training/test_optimization.py::test_averaged_weights_that_reach_no_checkpoint_are_refused
* A test scored patients that the model was trained on:
  modules/test_known_cases.py::test_a_case_that_was_trained_on_is_refused_by_name,
  modules/test_known_cases.py::test_the_same_scans_under_another_name_are_refused
* Weights, checksums, logits and losses that are not finite or do not hold:
  modules/test_damaged_checkpoints.py::test_no_command_uses_them,
  modules/test_damaged_checkpoints.py::test_a_flipped_bit_of_a_weight_is_found,
  modules/test_damaged_checkpoints.py::test_an_output_that_is_not_finite_is_one_sentence,
  modules/test_damaged_checkpoints.py::test_a_training_that_diverges_says_at_which_step
* A scale factor that left nothing of a label:
  data/test_one_judge.py::test_a_scale_that_leaves_nothing_of_a_label

Tracebacks

* overfit_batches, one callback for a list, a short OneCycle:
  cli/test_trainer_flags.py::test_flags_of_the_trainer_work,
  modules/training/test_optimization.py::test_one_cycle_has_any_number_of_steps
* Precisions that change the weights:
  modules/training/test_machine.py::test_weights_of_another_type_are_refused_before_anything_runs
* A schedule resumed for more epochs:
  modules/training/test_resuming.py::test_a_schedule_is_stretched_to_more_epochs
* Lightning's finder of learning rates; hparams:
  modules/training/test_optimization.py::test_the_tuner_sets_what_it_finds,
  modules/training/test_optimization.py::test_the_rate_is_read_and_set_on_the_module
* What Lightning, YAML and jsonargparse complain of; a wrong distance of weight 0:
  cli/test_mistakes.py::test_a_complaint_of_lightning_is_a_sentence,
  cli/test_mistakes.py::test_a_wrong_flag_is_a_sentence,
  cli/test_mistakes.py::test_a_wrong_file_is_a_sentence,
  cli/test_mistakes.py::test_a_wrong_distance_is_found_where_its_weight_is_0
* Masked pre-training of a dedicated network:
  modules/test_pretraining.py::test_a_dedicated_network_is_compared_with_its_own_sequences

Sentences that did not help

* A DICOM study in two sets of letters, or of nobody:
  dicom/test_dicom.py::test_patients_keep_their_names_in_any_letters,
  dicom/test_dicom.py::test_scans_that_were_made_anonymous_get_their_object
* A script without a main guard: data/store/test_proofs.py::test_a_script_without_a_main_guard
* A class of a script:
  modules/test_trust.py::test_a_class_of_a_script_is_found_in_the_module_that_is_named
* ITK's vectors, dataset.json of other spellings, challenges, other files and endings:
  data/cohorts/test_public_cohorts.py::test_vectors_as_itk_writes_them,
  data/cohorts/test_public_cohorts.py::test_usual_spellings_of_labels_are_read,
  data/cohorts/test_public_cohorts.py::test_channels_as_a_list_or_the_other_way_round,
  data/cohorts/test_public_cohorts.py::test_the_ignore_label_of_nnunet_is_read_or_made_background,
  data/cohorts/test_public_cohorts.py::test_damaged_descriptions_are_told_once,
  data/cohorts/test_public_cohorts.py::test_challenges_of_2023_and_later,
  data/cohorts/test_public_cohorts.py::test_files_that_are_not_read_are_named_as_the_cause,
  data/cohorts/test_public_cohorts.py::test_itk_formats_are_read_as_nifti_is,
  data/cohorts/test_public_cohorts.py::test_other_spellings_of_files_are_read
* Labels that are NaN or between integers:
  data/test_bad_input.py::test_a_damaged_case_gives_its_sentence_and_stops_no_other
* A misnamed file; axes at 45 degrees; channels that were dropped:
  data/test_odd_files.py::test_a_misnamed_file_is_read_like_one_that_is_named_right,
  data/test_one_judge.py::test_axes_at_45_degrees_are_read_alike_in_all_files,
  inference/test_files.py::test_every_channel_of_a_4d_file_is_named

Damaged files, malice, machine and load

* A checkpoint that names, fetches or runs what nobody trusts:
  modules/test_trust.py::test_of_other_packages_only_what_is_listed_may_be_named,
  modules/test_trust.py::test_a_loss_that_fetches_code_is_not_made,
  modules/test_trust.py::test_a_class_of_our_own_that_fetches_is_stopped
* More cases than open files:
  data/store/test_proofs.py::test_a_cohort_of_2000_cases_is_read_with_few_open_files,
  data/store/test_proofs.py::test_a_training_needs_fewer_open_files_than_cases
* One bad file that stopped a cohort:
  data/test_odd_files.py::test_a_file_that_unpacks_to_far_more_than_it_promises_stops_one_case_only,
  data/store/test_proofs.py::test_names_that_are_no_utf_8_stop_no_other_case
* export on a full disk, and over its source:
  inference/test_export.py::test_a_disk_that_fills_up_is_one_sentence,
  inference/test_export.py::test_the_source_of_an_export_is_not_replaced
* Names that lead out of a folder, are too long, or are formulas; planted links:
  inference/test_files.py::test_a_name_that_leads_out_of_the_folder_is_refused,
  inference/test_files.py::test_a_layout_whose_cases_lead_out_of_the_folder_is_refused,
  data/store/test_proofs.py::test_names_as_long_as_names_can_be,
  data/store/test_proofs.py::test_hidden_and_odd_folders_are_told,
  evaluation/records/test_records.py::test_odd_names_come_back_and_no_spreadsheet_runs_them,
  test_files.py::test_a_planted_link_is_never_followed
* Arrays and descriptions of a store that were changed:
  data/store/test_proofs.py::test_a_flipped_bit_in_the_header_of_an_array_is_one_sentence,
  data/store/test_proofs.py::test_a_flipped_bit_in_a_voxel_is_not_up_to_date,
  data/store/test_proofs.py::test_an_edited_meta_json_is_no_case,
  data/store/test_proofs.py::test_a_damaged_store_json_is_one_sentence
* Ctrl-C, killed processes and their workers:
  cli/test_main.py::test_ctrl_c_ends_a_training_with_130_and_one_line,
  cli/test_main.py::test_a_signal_in_the_midst_of_a_command,
  cli/test_main.py::test_the_server_of_a_quickstart_ends_with_it,
  data/store/test_proofs.py::test_a_killed_prepare_leaves_no_worker,
  campaign/test_kills.py::test_a_command_that_is_killed_at_random
* Output that is not UTF-8:
  cli/test_main.py::test_output_that_is_not_utf_8_loses_signs_and_nothing_else
* Damaged logs, sidecars, layouts and checkpoints; lack of memory; box plots of many cases:
  campaign/test_result_inputs.py::test_damaged_results_cause_no_fault,
  campaign/test_data_inputs.py::test_damaged_texts_cause_no_fault,
  evaluation/gap/test_changes.py::test_a_damaged_log_has_the_changes_that_it_holds,
  evaluation/records/test_records.py::test_a_damaged_sidecar_is_named,
  data/cohorts/test_described_layouts.py::test_a_field_that_is_no_expression,
  modules/test_damaged_checkpoints.py::test_a_damaged_description_loads_or_is_one_sentence,
  test_errors.py::test_lack_of_memory_is_a_sentence,
  evaluation/report/test_figures.py::test_a_box_plot_stays_small_for_any_cohort
"""
